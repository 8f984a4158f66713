"""Sweeps: time against `src.train -m`, and memory over a hundred trials."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import psutil

from benchmarks.pipeline import environment, run
from benchmarks.setting import Setting
from benchmarks.table import Figure, at_most
from src.common.errors import Failure
from src.common.paths import ROOT

TRIALS, MANY, SETTLED = 20, 100, 10
SHARE = at_most(0.5)  # of the time of `python -m src.train -m`
GROWTH = at_most(1.1)
SMALL = (
    "+experiment=cifar10_resnet",
    "data.loader.batch_size=100",
    "data.loader.eval_batch_size=100",
    "trainer.limit_train_batches=5",
    "trainer.limit_val_batches=1",
    "trainer.max_epochs=2",
    "trainer.threads=1",
    "model.network.width=8",
)


def measure(setting: Setting) -> list[Figure]:
    """Times the same twenty small trainings by both commands; with `slow` also measures memory over a hundred trials.

    On the sample, in a clone of what is committed.

    Raises:
        Failure: a command failed.
    """
    clone = setting.folder / "sweep-clone"
    run("git", "clone", "--quiet", str(ROOT), str(clone), folder=ROOT)
    rates = [f"{0.05 + 0.01 * i:.2f}" for i in range(TRIALS)]
    python = (sys.executable, "-m")
    run(*python, "src.train", *SMALL, "trainer.max_epochs=1", folder=clone)  # prepares the data
    multirun_s = run(*python, "src.train", "-m", *SMALL, f"model.optimizer.lr={','.join(rates)}", folder=clone)
    space = f"sweep.space={{model.optimizer.lr: {{choice: [{', '.join(rates)}]}}}}"
    options = ("sweep.sampler=grid", "sweep.pruner=none", "sweep.workers=2", space)
    sweep_s = run(*python, "src.sweep", *SMALL, *options, folder=clone)
    figures = [
        Figure.single("sweep", f"{TRIALS} trainings, python -m src.train -m", multirun_s, "s"),
        Figure.single("sweep", "the same, python -m src.sweep sweep.workers=2", sweep_s, "s"),
        Figure.single("sweep", "share of the time", sweep_s / multirun_s, "", SHARE),
    ]
    if setting.slow:
        shutil.rmtree(clone / "experiments" / "sweeps")
        command = (*python, "src.sweep", *SMALL, "trainer.max_epochs=1", f"sweep.trials={MANY}")
        early, late = _memory(command, setting)
        figures += [
            Figure.single("sweep", f"resident memory after trial {SETTLED}", early / 2**20, "MiB"),
            Figure.single("sweep", f"after trial {MANY}, relative to that", late / early, "", GROWTH),
        ]
    return figures


def _memory(command: tuple[str, ...], setting: Setting) -> tuple[int, int]:
    """Resident bytes of a sweep and its workers after trial `SETTLED` and after the last one."""
    clone = setting.folder / "sweep-clone"
    sizes = {}
    with subprocess.Popen(
        command, cwd=clone, env=environment(clone), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        sweep = psutil.Process(process.pid)
        for line in process.stdout or ():
            match = re.match(r" +(\d+)  (?:complete|pruned|fail)", line)
            if match and int(match[1]) in (SETTLED - 1, MANY - 1):
                processes = [sweep, *sweep.children(recursive=True)]
                sizes[int(match[1])] = sum(process.memory_info().rss for process in processes)
    if process.returncode or len(sizes) != 2:
        raise Failure(f"{' '.join(command)} failed with exit code {process.returncode}")
    return sizes[SETTLED - 1], sizes[MANY - 1]
