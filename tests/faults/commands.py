"""What the tests of faults share: commands as a user types them, short of room, killed; damage."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import commands_environment
from verification.interruption import TIMEOUT_S

Damage = Callable[[Path], None]


def run(
    folder: Path, *words: str, check: bool = True, room: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in a repository, to its end. No file that it writes gets more than `room` bytes, as on a full disk."""
    done = subprocess.run(
        words, text=True, capture_output=True, timeout=TIMEOUT_S, check=False, **_as_user(folder, room, environment)
    )
    assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@contextlib.contextmanager
def started(folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command under way, in a process group of its own; killed at the block's end."""
    process = subprocess.Popen(
        words,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **_as_user(folder, None, environment),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def _as_user(folder: Path, room: int | None, environment: dict[str, str]) -> dict[str, Any]:
    def limit() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return {"cwd": folder, "env": commands_environment() | environment, "preexec_fn": limit}


def holder(checkpoint: Path) -> int:
    """The id of the process that works on a checkpoint."""
    found = re.match(r"process (\d+) on ", checkpoint.with_name("holder").read_text())
    assert found
    return int(found[1])


def lives(process: int) -> bool:
    """Whether a process is there; one that has ended and that nobody asked for its exit code is not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def clone_of(repository: Path, folder: Path) -> Path:
    """What is committed in a repository, and nothing else of it."""
    run(repository, "git", "clone", "--quiet", ".", str(folder))
    return folder


def copy(repository: Path, folder: Path) -> Path:
    """A copy to do damage to, without the MLflow store, whose paths are the original's."""
    shutil.copytree(repository, folder, symlinks=True, ignore=shutil.ignore_patterns("mlflow", "mlflow.db*"))
    return folder


def output_of(said: str) -> str:
    """The folder that a training says it wrote, relative to the repository."""
    found = re.search(r"^trained in [\d.]+ s: (\S+)/train$", said, re.MULTILINE)
    assert found, said
    return found[1]


def refusal(done: subprocess.CompletedProcess[str], command: str) -> str:
    """The one line with which a command failed, with exit code 1 and without a traceback."""
    assert done.returncode == 1, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"{command} failed: ")]
    return line


def truncate(path: Path) -> None:
    """Leaves the first half, as a copy does that was broken off."""
    content = path.read_bytes()
    _replace(path, content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    """Changes one bit in the middle, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    _replace(path, bytes(content))


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # DVC may have it write-protected
    path.write_bytes(content)
