"""Starts commands in the background and waits for lines of their output."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import commands_environment
from tests.fork_server import start_command


def start(clone: Path, module: str, *words: str) -> subprocess.Popen[str]:
    """Starts `python -m module words` in the clone, as a user does; stdout and stderr come through one pipe."""
    return start_command((sys.executable, "-m", module, *words), clone, commands_environment())


def wait_for(process: subprocess.Popen[str], pattern: str) -> str:
    """Reads a process's output up to the first line that matches, and returns that line."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"no line matches {pattern}:\n{''.join(lines)}")


def _processes_of(node: Any) -> list[psutil.Process]:
    """All processes of a Ray node, and those that they started."""
    roots = [psutil.Process(item.process.pid) for items in node.all_processes.values() for item in items]
    return [process for root in roots for process in (*root.children(recursive=True), root)]


def commands_of(node: Any) -> list[str]:
    """The command lines of a Ray node's processes."""
    commands = []
    for process in _processes_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            commands.append(" ".join(process.cmdline()))
    return commands


def kill_node(node: Any) -> None:
    """Kills the processes of a Ray node, as a machine that loses its power."""
    for process in _processes_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
