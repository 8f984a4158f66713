"""Sends the journals of a sweep and its trials to MLflow from a separate process: no sweep waits for MLflow."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from src.tracking.journal import count_unsent, read_header
from src.tracking.sender import JournalSender

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
MAX_BACKOFF_S = 60.0
CLOSE_TIMEOUT_S = 20.0
FINAL_ATTEMPTS = 2  # a database may be locked for a moment

Lock = Callable[[str], AbstractContextManager[Any]]


class FolderSender:
    """Sends the journals in the folders that were added, every few seconds until it is closed."""

    def __init__(self, store: str, lock: Lock) -> None:
        """`store`: a MLflow tracking URI; `lock`: of the study's processes: only one creates the study's run."""
        self._folders: list[Path] = []
        context = multiprocessing.get_context("spawn")
        self._connection, remote_end = context.Pipe()
        self._process = context.Process(target=_send, args=(remote_end, store, lock), daemon=True)
        self._process.start()
        remote_end.close()

    def add(self, folder: Path) -> None:
        """Adds a folder; it need not exist yet."""
        self._folders.append(folder)
        self._connection.send(folder)

    def close(self) -> None:
        """Waits at most `CLOSE_TIMEOUT_S` until all is sent, and warns of what is not."""
        self._connection.close()
        self._process.join(CLOSE_TIMEOUT_S)
        self._process.terminate()
        if unsent := sum(map(count_unsent, _journals(self._folders))):
            log.warning("%d records of this sweep are not in MLflow yet: send them with `python -m src.sync`", unsent)


def _send(connection: Connection, store: str, lock: Lock) -> None:
    """The process; it ends when the sweep has closed its end of the pipe, or died, and all is sent."""
    os.setsid()  # Ctrl-C reaches the sweep alone
    folders: list[Path] = []
    senders: dict[Path, JournalSender] = {}
    logged: set[str] = set()
    interval, attempts, is_closed = INTERVAL_S, FINAL_ATTEMPTS, False
    while attempts:
        is_closed = is_closed or _receive_folders(connection, folders, interval)
        has_failed = False
        for journal in _journals(folders):
            sender = senders.setdefault(journal, JournalSender(journal, store, partial(lock, "mlflow")))
            sender.send()
            has_failed = has_failed or sender.failure is not None
            failure = [f"MLflow cannot be reached ({sender.failure}); the sweep goes on"] if sender.failure else []
            for message in (*sender.problems, *failure):
                if message not in logged:
                    logged.add(message)
                    log.warning(message)
        if is_closed:
            attempts = attempts - 1 if has_failed else 0
        interval = min(2 * interval, MAX_BACKOFF_S) if has_failed else INTERVAL_S


def _receive_folders(connection: Connection, folders: list[Path], timeout_s: float) -> bool:
    """Waits `timeout_s` and appends the folders that came meanwhile; returns whether the other end is closed."""
    deadline = time.monotonic() + timeout_s
    try:
        while connection.poll(max(0.0, deadline - time.monotonic())):
            folders.append(connection.recv())
    except EOFError:
        return True
    return False


def _journals(folders: Iterable[Path]) -> list[Path]:
    """The journals in the folders: a study's before its trials', whose runs belong under its run; then by start."""
    headers = {path: read_header(path) for folder in folders for path in folder.rglob("*.jsonl")}
    return [path for *_, path in sorted(("parent" in h, h["time"], path) for path, h in headers.items() if h)]
