"""The pipeline: start-up of commands, `dvc repro` from nothing, and `dvc repro` with nothing to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.setting import Setting
from benchmarks.table import Figure, at_most
from benchmarks.timing import paired
from src.common.errors import Failure
from src.common.paths import ROOT

REPRO = at_most(240.0)  # seconds


def measure(setting: Setting) -> list[Figure]:
    """Start-up; with `slow` also `dvc repro` on the sample, from nothing and again; in a clone of the last commit.

    Raises:
        Failure: a command failed.
    """
    clone = setting.folder / "clone"
    run("git", "clone", "--quiet", str(ROOT), str(clone), folder=ROOT)
    commands = {
        "src.compose": (sys.executable, "-m", "src.compose", "experiment", setting.experiments[0]),
        "src.train --help": (sys.executable, "-m", "src.train", "--help"),
    }
    rounds = paired({name: lambda c=words: run(*c, folder=clone) for name, words in commands.items()}, setting.rounds)  # type: ignore[misc]
    figures = [Figure("pipeline", f"python -m {name}", rounds.spread(name), "s") for name in commands]
    if setting.slow:
        start = time.perf_counter()
        stages = list(stage_times(clone))
        total = time.perf_counter() - start
        figures += [Figure.single("pipeline", f"stage {stage}", seconds, "s") for stage, seconds in stages]
        figures.append(Figure.single("pipeline", "dvc repro, sample, from nothing", total, "s", REPRO))
        repeated = paired({"repro": lambda: run("dvc", "repro", folder=clone)}, setting.rounds)
        figures.append(Figure("pipeline", "dvc repro, nothing to do", repeated.spread("repro"), "s"))
    return figures


def stage_times(clone: Path) -> Iterator[tuple[str, float]]:
    """Runs `dvc repro`; yields each stage and the seconds from its start to the next one's, DVC's own work included.

    Raises:
        Failure: a stage failed.
    """
    current, since, tail = "", 0.0, ""
    with subprocess.Popen(
        ["dvc", "repro"],
        cwd=clone,
        env=environment(clone),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            tail = (tail + line)[-500:]
            if match := re.search(r"Running stage '([^']+)'", line):
                now = time.perf_counter()
                if current:
                    yield current, now - since
                current, since = match[1], now
    if process.returncode:
        raise Failure(f"dvc repro failed in a clean clone: {' '.join(tail.split())}")
    yield current, time.perf_counter() - since


def run(*command: str, folder: Path) -> float:
    """Runs a command; returns the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{' '.join(command)} failed: {' '.join(done.stderr.split())[-500:]}")
    return time.perf_counter() - start


def environment(folder: Path) -> dict[str, str]:
    """The environment after activating .venv, with the folder's own MLflow store."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    return inherited | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
