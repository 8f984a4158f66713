"""The claims: one interruption, repetition or number of processes each, decided by comparing digests."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.common.errors import Failure
from src.common.git import git, worktree_environment
from verification.small_run import KILLS, SmallRun

TWO_PROCESSES = ("trainer=ddp", "trainer.devices=2")


@dataclass(frozen=True)
class Claim:
    """A line of the table; `holds` is None where the claim has nothing to compare."""

    experiment: str
    text: str
    holds: bool | None
    detail: str = ""


def compare(
    experiment: str, text: str, digests: Mapping[str, str], expected: Mapping[str, str], detail: str = ""
) -> Claim:
    """The claim that two sets of digests are the same; the detail of a broken one names those that differ."""
    differing = sorted(key for key in digests.keys() | expected.keys() if digests.get(key) != expected.get(key))
    return Claim(experiment, text, not differing, f"differs: {', '.join(differing)}" if differing else detail)


def experiment_claims(experiment: str, worktree: Path) -> Iterator[Claim]:
    """Trains an experiment in every way and yields each claim as soon as it is decided.

    Raises:
        Failure: a training, an evaluation or an export failed.
    """
    run = SmallRun(experiment, worktree, random.Random())
    compared = partial(compare, experiment)

    run.train()
    bits, outputs = run.bits(), run.outputs()
    run.train()
    detail = f"weights {bits['weights'][:8]}, optimizer {bits['optimizer'][:8]}"
    yield compared("trained twice from scratch", run.bits(), bits, detail)
    detail = f"{len(outputs)} files of train, evaluate, export"
    yield compared("every file that DVC hashes, twice", run.outputs(), outputs, detail)

    interruptions = {
        f"SIGKILL in mid-epoch, {KILLS} times": run.kill_anywhere,
        "SIGKILL while an epoch's checkpoint is written": run.kill_at_epoch_end,
        "SIGTERM, then Ctrl-C": run.terminate,
    }
    for text, interrupt in interruptions.items():
        detail = interrupt()
        run.train()
        yield compared(text, run.bits(), bits, detail)

    yield Claim(experiment, "0 and 2 loader workers", None, "no workers: batches are built in the process")
    run.train("trainer.strategy=ddp")
    yield compared("one process, and DDP with one", run.bits(), bits)
    run.train(*TWO_PROCESSES)
    bits = run.bits()
    run.train(*TWO_PROCESSES)
    yield compared("DDP with two, twice", run.bits(), bits)
    detail = run.kill_anywhere(*TWO_PROCESSES)
    run.train(*TWO_PROCESSES)
    yield compared(f"DDP with two, SIGKILL {KILLS} times", run.bits(), bits, detail)


def pipeline_claim(worktree: Path) -> Claim:
    """`dvc repro --force` twice: the second one leaves dvc.lock as the first one wrote it.

    Raises:
        Failure: a stage failed.
    """
    locks = []
    for _ in range(2):
        command = [sys.executable, "-m", "dvc", "repro", "--force"]
        done = subprocess.run(
            command, cwd=worktree, env=worktree_environment(worktree), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failure(f"dvc repro failed:\n{(done.stdout + done.stderr)[-2000:]}")
        locks.append((worktree / "dvc.lock").read_text())
    state = "differs from" if git("diff", "--stat", "dvc.lock", cwd=worktree) else "is the same as"
    return Claim("all", "`dvc repro --force` twice", locks[0] == locks[1], f"dvc.lock {state} the committed one")
