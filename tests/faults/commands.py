"""Helpers of the fault tests: commands as a user types them, a limit on file sizes, kills, damaged files."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.conftest import commands_environment, run_in
from tests.fork_server import start_command
from verification.interruption import TIMEOUT_S

Damage = Callable[[Path], None]


def run(
    folder: Path, *words: str, check: bool = True, room: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a repository. No file that it writes gets larger than `room` bytes, as on a full disk."""
    if room is not None:
        words = ("prlimit", f"--fsize={room}", *words)
    return run_in(folder, *words, timeout=TIMEOUT_S, check=check, **environment)


@contextlib.contextmanager
def started(folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a command, other ones than the project's in a process group of their own; kills it at the end."""
    process = start_command(words, folder, commands_environment() | environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def holder(checkpoint: Path) -> int:
    """The id of the process that trains into a checkpoint's folder."""
    match = re.match(r"process (\d+) on ", checkpoint.with_name("holder").read_text())
    assert match
    return int(match[1])


def is_running(process: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def clone_of(repository: Path, folder: Path) -> Path:
    """Clones a repository: only what is committed."""
    run(repository, "git", "clone", "--quiet", ".", str(folder))
    return folder


def copy(repository: Path, folder: Path) -> Path:
    """Copies a repository, without its MLflow store, which holds paths of the original."""
    shutil.copytree(repository, folder, symlinks=True, ignore=shutil.ignore_patterns("mlflow", "mlflow.db*"))
    return folder


def output_of(stdout: str) -> str:
    """The folder that a training wrote, relative to the repository."""
    match = re.search(r"^trained in [\d.]+ s: (\S+)/train$", stdout, re.MULTILINE)
    assert match, stdout
    return match[1]


def refusal(done: subprocess.CompletedProcess[str], command: str) -> str:
    """The error line of a command that failed with exit code 1 and without a traceback."""
    assert done.returncode == 1, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(f"{command} failed: ")]
    return line


def truncate(path: Path) -> None:
    """Keeps the first half of a file, as an interrupted copy does."""
    content = path.read_bytes()
    _replace(path, content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    """Flips one bit in the middle of a file, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    _replace(path, bytes(content))


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # DVC write-protects its files
    path.write_bytes(content)
