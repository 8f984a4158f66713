"""The duties of a stage that DVC runs: to end with that DVC, and to leave the last good outputs behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from src.common.console import console

POLL_S = 0.5
NAME = "DVC_STAGE"  # DVC sets it for the commands of its stages


def is_dvc_stage() -> bool:
    """Whether DVC runs this process as a stage."""
    return NAME in os.environ


def end_with_dvc() -> None:
    """In a stage of DVC's, sends SIGTERM to this process as soon as that DVC is gone.

    A DVC that is killed with SIGKILL cannot do it, and the next `dvc repro` would start a second trainer beside the
    first. The nearest `dvc` among the ancestors is watched, not the parent, which may be a shell.
    """
    if not is_dvc_stage():
        return
    import psutil

    ancestors = psutil.Process().parents()
    dvc = next((process for process in ancestors if _is_dvc(process)), ancestors[0] if ancestors else None)
    if dvc is None:
        return

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
                time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-dvc", daemon=True).start()


def _is_dvc(process: object) -> bool:
    import psutil

    try:
        words = process.cmdline()[:3]  # type: ignore[attr-defined]
    except psutil.Error:
        return False
    return any(os.path.basename(word) in ("dvc", "dvc.exe") for word in words)


def restore_outputs() -> None:
    """In a stage of DVC's that failed, restores the outputs that dvc.lock names from the cache.

    DVC deletes a stage's outputs before it runs it. Outputs that the cache does not hold stay as they are.
    """
    if not is_dvc_stage():
        return
    try:
        from dvc.repo import Repo

        path, _, name = os.environ[NAME].rpartition(":")
        with Repo() as repo:
            for out in repo.stage.load_one(path or None, name).outs:
                out.use_cache = True  # metrics are git's, but the run cache holds them as well
                with contextlib.suppress(FileNotFoundError):  # it was cleaned out
                    out.checkout(force=True, allow_missing=True)
    except Exception as error:  # the stage's own failure is the one to report
        console.error(f"the last good outputs could not be restored ({error}): `dvc checkout` does it")
