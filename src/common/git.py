"""A scratch worktree: this repository at a commit, with a patch on it, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from src.common.errors import Failure
from src.common.paths import ROOT


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
                git("apply", "--whitespace=nowarn", "-", cwd=folder, given=patch)
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(*words: str, cwd: Path = ROOT, given: str | None = None, index: Path | None = None) -> str:
    """What a git command says on stdout; `index`: another file than the repository's own index.

    Raises:
        Failure: git is missing, or refuses; with its reason.
    """
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"} | ({"GIT_INDEX_FILE": str(index)} if index else {})
    try:
        done = subprocess.run(
            ["git", *words], cwd=cwd, input=given, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise Failure(f"git can't be run: {error}") from None
    if done.returncode:
        raise Failure(f"git {words[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def worktree_environment(folder: Path) -> dict[str, str]:
    """The environment of a command in a worktree: its own MLflow store, no DVC above it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    return kept | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'experiments' / 'mlflow.db'}"}
