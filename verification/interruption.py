"""Waits for the moment at which a training is to be interrupted; the tests of faults use it as well."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from src.common.errors import Failure
from src.common.files import sha256_of

TIMEOUT_S = 300.0  # of every wait


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Polls every millisecond until `condition` holds, which may last for a few milliseconds only.

    Raises:
        Failure: the process ended before, or the timeout passed; with the end of its output.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise Failure(f"the process ended too early, or hung:\n{process.communicate()[0][-4000:]}")
        time.sleep(0.001)


def wait_for_checkpoint(repository: Path, process: subprocess.Popen[str]) -> Path:
    """Waits until one more working checkpoint is written; its path."""
    before = checkpoints(repository)
    wait_until(lambda: bool(checkpoints(repository) - before), process)
    return max(checkpoints(repository) - before, key=lambda checkpoint: checkpoint[1])[0]


def checkpoints(repository: Path) -> set[tuple[Path, int]]:
    """The last working checkpoint of each unfinished run, with the time at which it was written, in nanoseconds."""
    return {(path, path.stat().st_mtime_ns) for path in repository.glob("experiments/.work/*/last.ckpt")}


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file under a folder, by its path relative to the folder."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
