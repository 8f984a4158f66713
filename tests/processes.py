"""Commands that go on while a test looks at them, or does something to them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import commands_environment


def start(clone: Path, module: str, *words: str) -> subprocess.Popen[str]:
    """`python -m module words` in the clone, as a user types it; all that it prints comes through one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=clone,
        env=commands_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], pattern: str) -> str:
    """Reads a process's lines until one matches, and returns that one."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"{pattern} did not come:\n{''.join(seen)}")
