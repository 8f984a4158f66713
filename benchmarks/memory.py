"""Memory: the peak of the train stage beyond the packed data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.setting import Setting
from benchmarks.table import Figure, at_most
from src.common.errors import Failure
from src.common.paths import ROOT

BEYOND_DATA = at_most(1.5)  # GiB
STEPS = 10  # per epoch: enough to include the longest texts


def measure(setting: Setting) -> list[Figure]:
    """A short training of each experiment by `python -m src.train`, MLflow and validation included.

    Raises:
        Failure: a training failed, or this is not Linux.
    """
    if sys.platform != "linux":
        raise Failure("a process's peak is read from Linux's /proc: name the other benchmarks")
    return [figure for name in setting.experiments for figure in measure_one(name, setting)]


def measure_one(name: str, setting: Setting) -> list[Figure]:
    """The figures of one experiment.

    Raises:
        Failure: the stage failed.
    """
    config = setting.prepare(name)
    data = sum((config.processed / f"{split}.safetensors").stat().st_size for split in ("train", "val"))
    # Two epochs: progressive resizing reaches the full size in the second.
    limits = ["trainer.max_epochs=2", f"trainer.limit_train_batches={STEPS}", "trainer.limit_val_batches=2"]
    run_dir = f'hydra.run.dir="{setting.folder / name / "hydra"}"'
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{setting.folder / name / 'mlflow.db'}"}
    command = [sys.executable, "-m", "src.train", *setting.arguments(name), *limits, run_dir]
    peak = peak_memory(command, os.environ | store)
    label = f"memory {name}"
    return [
        Figure.single(label, "packed data", data / 2**30, "GiB"),
        Figure.single(label, "peak of src.train beyond it", (peak - data) / 2**30, "GiB", BEYOND_DATA),
    ]


def peak_memory(command: list[str], environment: dict[str, str]) -> int:
    """The largest resident set of a process, in bytes.

    Read from /proc/PID/status: `ru_maxrss` of a child is at least what its parent held when it forked.

    Raises:
        Failure: the command failed.
    """
    peak = 0
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            # A process has no such line between exec and its first page, and after its end.
            match = re.search(r"VmHWM:\s+(\d+) kB", status)
            peak = max(peak, int(match[1]) * 1024 if match else 0)
            time.sleep(0.02)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise Failure(f"{' '.join(command)} failed: {' '.join(output.split())[-500:]}")
    return peak
