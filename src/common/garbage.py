"""Keeps Python's garbage collector out of the start and the end of a process."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the collector while large libraries are imported, then exempts their objects from it (`gc.freeze`).

    torch and Lightning make some two million objects that live as long as the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def skip_collection_at_exit() -> None:
    """Spares the interpreter's last collections, whose memory the operating system takes back anyway."""
    atexit.register(gc.freeze)
