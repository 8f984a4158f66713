"""Where a study is kept. Several processes, on any machines, share what lies in a database or on a shared file system.

    sweep.storage=null                         SQLite in the study's folder, for one process at a time
    sweep.storage=postgresql://HOST/DATABASE   any number of processes that reach the server
    sweep.storage=journal:PATH                 any number of processes that see the folder

What sharing needs beside Optuna's own storages: a lock around each ask, so that the count of trials is exact, and a
heartbeat of each trial that is being trained, so that a dead machine's trials are noticed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from src.common.errors import Failure
from src.common.paths import ROOT
from src.sweeping.space import JOURNAL, Sweep

DATABASE = "study.db"
GRACE = 5  # heartbeats that are missed before a trial counts as abandoned: a machine may be busy, or a network slow
CONNECT_WITHIN_S = 10
# A server that is restarted is back within this; a machine whose network is gone is noticed.
PATIENCE_S, RETRY_EVERY_S = 300.0, 2.0
KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}

# Holds off, for a purpose, all other processes that share the study. Can be pickled.
Lock = Callable[[str], AbstractContextManager[Any]]


class Storage(Protocol):
    """A place where studies are kept."""

    backend: BaseStorage
    shared: bool  # whether several processes may work on a study at once
    lock: Lock

    def beat(self, trial_id: int) -> None:
        """Says that a trial's process is alive."""

    def silent(self, study: optuna.Study) -> set[int]:
        """The ids of those unfinished trials whose process has said nothing for long."""


def opened(sweep: Sweep, study: str, folder: Path) -> Storage:
    """The storage that the configuration names, made where it is not there; `folder`: the study's own.

    Raises:
        Failure: it can't be reached, or read.
    """
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # ours is recorded by a thread
    if sweep.storage is None:
        return _Alone(folder)
    if sweep.storage.startswith(JOURNAL):
        return _Journal(_path(sweep.storage), sweep.heartbeat_s, study)
    return _Database(sweep.storage, sweep.heartbeat_s, study)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Says in one line that the database was lost for good.

    Raises:
        Failure: in place of what Optuna and the database raise.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        said = str(getattr(cause, "orig", cause)).strip().splitlines()[0]
        raise Failure(f"the study's storage failed ({said}); the same command goes on") from None


class _Alone:
    """A database in the study's folder. A transaction is there or not, whenever the process is killed."""

    shared = False
    lock: Lock = contextlib.nullcontext

    def __init__(self, folder: Path) -> None:
        self.backend: BaseStorage = RDBStorage(f"sqlite:///{folder / DATABASE}")

    def beat(self, trial_id: int) -> None:
        """Nobody listens."""

    def silent(self, study: optuna.Study) -> set[int]:
        """All: the folder's lock keeps other processes out, so whoever trained them is dead."""
        return {trial._trial_id for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}


class _Database:
    """PostgreSQL. Its clock is the one that heartbeats are measured by."""

    shared = True

    def __init__(self, address: str, beat_s: int, study: str) -> None:
        self.lock: Lock = functools.partial(_advisory_lock, address, study)
        connect = _Connect(address)
        with failures(), _advisory_lock(address, "", "tables"):  # whoever is first makes the tables
            self._storage = RDBStorage(
                "postgresql+psycopg2://",  # how to connect, and so the password, is the creator's business
                engine_kwargs={"creator": connect, "pool_pre_ping": True},
                heartbeat_interval=beat_s,
                grace_period=GRACE * beat_s,
            )
        connect.patience = PATIENCE_S
        self.backend: BaseStorage = self._storage

    def beat(self, trial_id: int) -> None:
        self._storage.record_heartbeat(trial_id)

    def silent(self, study: optuna.Study) -> set[int]:
        return set(self._storage._get_stale_trial_ids(study._study_id))


class _Connect:
    """Connects to PostgreSQL; once it has been there, waits for it to come back."""

    def __init__(self, address: str, patience: float = 0.0) -> None:
        self.address = address
        self.patience = patience

    def __call__(self) -> Any:
        """A connection.

        Raises:
            Failure: the server can't be reached, or refuses.
        """
        try:
            import psycopg2
        except ImportError:
            remedy = "pip install psycopg2-binary (the extra `cluster` of pyproject.toml)"
            raise Failure(f"sweep.storage: postgresql:// needs psycopg2, which is not installed: {remedy}") from None
        until = time.monotonic() + self.patience
        told = False
        while True:
            try:
                return psycopg2.connect(self.address, connect_timeout=CONNECT_WITHIN_S, **KEEPALIVE)
            except psycopg2.Error as error:
                said = str(error).strip().splitlines()[0]
                where = f"the database of the study ({_place(self.address)})"
                if time.monotonic() > until:
                    rest = "" if not self.patience else "; the same command goes on once it is back"
                    raise Failure(f"{where} cannot be reached: {said}{rest}") from None
                if not told:
                    told = True
                    print(f"{where} cannot be reached, trying for {self.patience:.0f} s: {said}", flush=True)
                time.sleep(RETRY_EVERY_S)


@contextlib.contextmanager
def _advisory_lock(address: str, study: str, purpose: str) -> Iterator[None]:
    """A lock among all clients of the database; it goes with its connection, however that ends."""
    name = f"sweep {study} {purpose}"
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
    with contextlib.closing(_Connect(address, PATIENCE_S if study else 0.0)()) as connection:
        connection.cursor().execute("SELECT pg_advisory_lock(%s)", (key,))
        yield


def _place(address: str) -> str:
    """A database's address without its credentials."""
    parts = urlsplit(address)
    return f"{parts.hostname or 'localhost'}:{parts.port or 5432}{parts.path}"


class _Journal:
    """Optuna's journal, a file that is only appended to. The file system's clock is the one for heartbeats.

    A heartbeat is the modification time of a file beside the journal: Optuna's journal knows none.
    """

    shared = True

    def __init__(self, path: Path, beat_s: int, study: str) -> None:
        self._grace = GRACE * beat_s
        self._beats = path.with_name(f"{path.name}.beats")
        try:
            self._beats.mkdir(parents=True, exist_ok=True)
            self.backend: BaseStorage = JournalStorage(JournalFileBackend(str(path), _MendingLock(str(path))))
        except (OSError, ValueError) as error:
            raise Failure(f"sweep.storage: {path} can't be used as a journal: {error}") from None
        self.lock: Lock = functools.partial(_file_lock, f"{path}.{study}")

    def beat(self, trial_id: int) -> None:
        (self._beats / str(trial_id)).touch()

    def silent(self, study: optuna.Study) -> set[int]:
        now = self._beats / "now"
        now.touch()
        return {
            trial._trial_id
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if now.stat().st_mtime - self._last(trial._trial_id) > self._grace
        }

    def _last(self, trial_id: int) -> float:
        try:
            return (self._beats / str(trial_id)).stat().st_mtime
        except FileNotFoundError:
            return 0.0


class _MendingLock(JournalFileOpenLock):
    """The lock of those who append to the journal; who gets it cuts off the line that a dead one left unfinished.

    Otherwise the next line would continue it, and nobody could read the journal any more.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        acquired = super().acquire()
        with open(self._path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return acquired


@contextlib.contextmanager
def _file_lock(path: str, purpose: str) -> Iterator[None]:
    """A lock that needs nothing but files that are made exclusively, which every network's file system knows."""
    lock = JournalFileOpenLock(f"{path}.{purpose}")
    lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # held too long, by a process that was stopped: another one took it
            lock.release()


def _path(storage: str) -> Path:
    return ROOT / Path(storage.removeprefix(JOURNAL)).expanduser()
