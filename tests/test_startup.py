"""Profilers and optional imports in training processes; memory is kept until it is released."""

from __future__ import annotations

import json
import os
import platform
import pstats
import subprocess
import sys
from pathlib import Path

import pytest

from src.configuration.command import bound_spinning
from tests.conftest import Run

ROOT = Path(__file__).resolve().parents[1]


TRAINING = ("-m", "src.train", "+experiment=imdb_lstm", "debug=fast", "model.hidden=8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cprofile_writes_the_profile_of_a_training(run: Run, tmp_path: Path) -> None:
    run("python", "-m", "cProfile", "-o", str(tmp_path / "profile"), *TRAINING)
    functions = {name for _, _, name in pstats.Stats(str(tmp_path / "profile")).stats}  # type: ignore[attr-defined]
    assert "train" in functions


@pytest.mark.long
@pytest.mark.timeout(600)
def test_coverage_writes_the_data_of_a_training(run: Run, tmp_path: Path) -> None:
    run("python", "-m", "coverage", "run", "--data-file", str(tmp_path / "coverage"), *TRAINING, "seed=1")
    assert (tmp_path / "coverage").stat().st_size > 10_000


def test_waiting_threads_sleep_soon_unless_the_user_has_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # put back at the end
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    bound_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    bound_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


OPTIONAL = """
from src.training import run
from torchmetrics.detection import MeanAveragePrecision
import torchmetrics.utilities.imports as imports
assert imports._MATPLOTLIB_AVAILABLE and imports._TORCHVISION_AVAILABLE
"""


def test_all_torchmetrics_are_available_in_a_training_process() -> None:
    done = subprocess.run([sys.executable, "-c", OPTIONAL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


MEMORY = """
import json, sys
from src.common.hardware import keep_freed_memory, release_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

keep_freed_memory()
import torch
sizes = [resident()]
small = [torch.ones(2**19) for _ in range(200)]  # of 2 MiB each
end = torch.ones(2**10)
sizes.append(resident())
del small
sizes.append(resident())
release_freed_memory()
sizes.append(resident())
json.dump(sizes, sys.stdout)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps and releases memory on demand")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, allocated, freed, released = json.loads(done.stdout)
    assert allocated > before + 390
    assert freed > allocated - 10
    assert released < before + 10
