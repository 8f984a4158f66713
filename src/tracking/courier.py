"""Carries the journals of a sweep and of its trials to MLflow, from a process of its own: nobody waits for it."""

from __future__ import annotations

import logging
import multiprocessing
import os
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from src.tracking.journal import count_unsent, read_header
from src.tracking.sender import JournalSender

if TYPE_CHECKING:
    from src.sweeping.storage import Lock

log = logging.getLogger(__name__)

SEND_EVERY_S = 2.0
RETRY_AT_MOST_EVERY_S = 60.0
PATIENCE_S = 20.0
LAST_TRIES = 2  # a database may just then have been locked


class Courier:
    """Sends the journals under `folder` to `store` from time to time, until it is closed."""

    def __init__(self, folder: Path, store: str, lock: Lock) -> None:
        """`lock`: among the processes that share the study, so that one of them makes the sweep's run."""
        self._folder = folder
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_carry, args=(theirs, folder, store, lock), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """Lets it send the rest, for as long as patience lasts, and says what remains."""
        self._connection.close()
        self._process.join(PATIENCE_S)
        self._process.terminate()
        if unsent := sum(map(count_unsent, self._folder.rglob("*.jsonl"))):
            log.warning("%d records of this sweep are not in MLflow yet: send them with `python -m src.sync`", unsent)


def _carry(connection: Connection, folder: Path, store: str, lock: Lock) -> None:
    """The process; it ends when the sweep closes its end of the pipe, or dies, and all is sent."""
    os.setsid()  # Ctrl-C reaches the sweep alone
    drains: dict[Path, JournalSender] = {}
    said: set[str] = set()
    rest, tries, closed = SEND_EVERY_S, 0, False
    while tries < LAST_TRIES:
        closed = closed or connection.poll(rest)
        failed = False
        for journal in _oldest_first(folder):
            drain = drains.setdefault(journal, JournalSender(journal, store, partial(lock, "mlflow")))
            drain.send()
            failed = failed or drain.failure is not None
            news = [f"MLflow cannot be reached ({drain.failure}); the sweep goes on"] * bool(drain.failure)
            for line in (*drain.problems, *news):
                if line not in said:
                    said.add(line)
                    log.warning(line)
        if closed and not failed:
            return
        tries += closed
        rest = min(2 * rest, RETRY_AT_MOST_EVERY_S) if failed else SEND_EVERY_S


def _oldest_first(folder: Path) -> list[Path]:
    """The sweep's own first, the trials' belong under it; then in the order in which their runs began."""
    found = [
        ("parent" in header, header["time"], path) for path in folder.rglob("*.jsonl") if (header := read_header(path))
    ]
    return [path for *_, path in sorted(found)]
