"""What a process owes to the DVC that runs it as a stage: to end with it, and to leave the last good outputs behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

POLL_S = 0.5
NAME = "DVC_STAGE"  # DVC sets it for the commands of its stages


def end_with_dvc() -> None:
    """Where DVC runs this process, sends SIGTERM to it as soon as that DVC is gone.

    A DVC that is killed with SIGKILL cannot do it, and the next `dvc repro` would start a second trainer beside the
    first. A shell between the two does not hinder: the nearest `dvc` above is watched, not the parent.
    """
    if NAME not in os.environ:
        return
    import psutil

    above = psutil.Process().parents()
    dvc = next((process for process in above if _is_dvc(process)), above[0] if above else None)
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


def put_back_outputs() -> None:
    """Where DVC runs this process as a stage, which failed: puts the outputs that dvc.lock names back from the cache.

    DVC deletes a stage's outputs before it runs it; so a failure leaves the last good ones after all. What the cache
    does not have stays as it is.
    """
    if NAME not in os.environ:
        return
    try:
        from dvc.repo import Repo

        path, _, name = os.environ[NAME].rpartition(":")
        with Repo() as repo:
            for out in repo.stage.load_one(path or None, name).outs:
                out.use_cache = True  # metrics are git's, but the run cache holds them as well
                with contextlib.suppress(FileNotFoundError):  # it was cleaned out
                    out.checkout(force=True, allow_missing=True)
    except Exception as error:  # whatever happens here, it is the stage's failure that is to be told
        print(f"the last good outputs could not be put back ({error}): `dvc checkout` does it", file=sys.stderr)
