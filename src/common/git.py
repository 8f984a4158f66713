"""Runs git, and makes scratch worktrees: this repository at a commit, with a patch, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from src.common.errors import Failure
from src.common.paths import ROOT, sqlite_address


@contextlib.contextmanager
def worktree(commit: str, patch: str) -> Iterator[Path]:
    """The folder of a worktree that is removed afterwards.

    Raises:
        Failure: this repository does not have the commit, or the patch does not fit it.
    """
    with tempfile.TemporaryDirectory(prefix="worktree-") as temporary:
        folder = Path(temporary) / "repository"
        git("worktree", "add", "--quiet", "--detach", str(folder), commit)
        try:
            if "diff --git " in patch:  # git refuses a patch of nothing but the names of files left out
                git("apply", "--whitespace=nowarn", "-", cwd=folder, stdin=patch)
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(
    *arguments: str, cwd: Path = ROOT, stdin: str = "", index: Path | None = None, timeout_s: float | None = None
) -> str:
    """Runs a git command; returns its stdout, line ends unchanged. It takes no optional lock and never prompts.

    `index`: another file than the repository's own index.

    Raises:
        Failure: git is missing, refuses (with its reason), or takes longer than `timeout_s`.
    """
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    if index:
        environment |= {"GIT_INDEX_FILE": str(index)}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=cwd,
            input=stdin.encode(),
            env=environment,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except OSError as error:
        raise Failure(f"git can't be run: {error}") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"git {arguments[0]} took longer than {timeout_s:g} s") from None
    if done.returncode:
        raise Failure(f"git {arguments[0]} failed: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout.decode(errors="replace")


def worktree_environment(folder: Path) -> dict[str, str]:
    """The environment of a command in a worktree: its own MLflow store, no DVC above it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    return inherited | {"MLFLOW_TRACKING_URI": sqlite_address(folder / "experiments" / "mlflow.db")}
