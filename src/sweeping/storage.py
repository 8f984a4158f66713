"""Storages of a study: for one sweep process, or shared by several, on any machines.

    sweep.storage=null                         SQLite in the study's folder, one process at a time
    sweep.storage=postgresql://HOST/DATABASE   any number of processes that reach the server
    sweep.storage=journal:PATH                 any number of processes that see the file

To Optuna's storages this adds a lock around each ask, so that the count of trials is exact, and a heartbeat for each
trial in training, so that another process takes over the trials of a dead machine.
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
from src.common.paths import ROOT, sqlite_address
from src.sweeping.optuna_internals import stale_trial_ids, trial_id
from src.sweeping.space import JOURNAL, Sweep

DATABASE = "study.db"
HEARTBEAT_S = 60
# Missed heartbeats after which a trial is taken over. Their time is that for which a process waits for the database to
# come back: after an outage no process takes over the trials of another live one.
MISSED_HEARTBEATS = 5
RECONNECT_TIMEOUT_S, RECONNECT_INTERVAL_S = 300.0, 2.0
CONNECT_TIMEOUT_S = 10
KEEPALIVE = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}  # seconds, seconds, probes

# Of a purpose: excludes all other processes that share the study. Can be pickled.
Lock = Callable[[str], AbstractContextManager[Any]]


class Storage(Protocol):
    """A storage of studies."""

    backend: BaseStorage
    is_shared: bool  # whether several processes may work on a study at once
    lock: Lock

    def record_heartbeat(self, trial_id: int) -> None:
        """Notes that the trial's process is alive."""

    def stale_trials(self, study: optuna.Study) -> set[int]:
        """The ids of running trials whose process has sent no heartbeat for too long."""


def open_storage(sweep: Sweep, study: str, folder: Path) -> Storage:
    """Opens, or creates, the storage that `sweep.storage` names; `folder`: the study's own.

    Raises:
        Failure: it can't be reached, or read.
    """
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # a thread of Study records it
    if sweep.storage is None:
        return _SQLite(folder)
    if sweep.storage.startswith(JOURNAL):
        path = ROOT / Path(sweep.storage.removeprefix(JOURNAL)).expanduser()
        return _Journal(path, study)
    return _PostgreSQL(sweep.storage, study)


@contextlib.contextmanager
def storage_errors_in_one_line() -> Iterator[None]:
    """Turns the errors of Optuna's storages and of the database into one line.

    Raises:
        Failure: instead of them.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        message = str(getattr(cause, "orig", cause)).strip().splitlines()[0]
        raise Failure(f"the study's storage failed ({message}); the same command goes on") from None


class _SQLite:
    """A database in the study's folder, for one process. SQLite's transactions survive a kill at any moment."""

    is_shared = False
    lock: Lock = contextlib.nullcontext

    def __init__(self, folder: Path) -> None:
        self.backend: BaseStorage = RDBStorage(sqlite_address(folder / DATABASE))

    def record_heartbeat(self, trial_id: int) -> None:
        """No-op: a study with one process needs no heartbeat."""

    def stale_trials(self, study: optuna.Study) -> set[int]:
        """All running trials: the folder's lock excludes other processes, so their process is dead."""
        return {trial_id(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}


class _PostgreSQL:
    """A PostgreSQL database. Heartbeats are measured by its clock."""

    is_shared = True

    def __init__(self, address: str, study: str) -> None:
        self.lock: Lock = functools.partial(_advisory_lock, address, study)
        connect = _Connect(address)
        with (
            storage_errors_in_one_line(),
            _advisory_lock(address, "", "tables"),
        ):  # the first process creates the tables
            self._storage = RDBStorage(
                "postgresql+psycopg2://",  # without the address: its password would be in SQLAlchemy's messages
                engine_kwargs={"creator": connect, "pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=MISSED_HEARTBEATS * HEARTBEAT_S,
            )
        connect.timeout_s = RECONNECT_TIMEOUT_S
        self.backend: BaseStorage = self._storage

    def record_heartbeat(self, trial_id: int) -> None:
        self._storage.record_heartbeat(trial_id)

    def stale_trials(self, study: optuna.Study) -> set[int]:
        return stale_trial_ids(self._storage, study)


class _Connect:
    """Connects to PostgreSQL, trying for `timeout_s` seconds; 0: once."""

    def __init__(self, address: str, timeout_s: float = 0.0) -> None:
        self.address = address
        self.timeout_s = timeout_s

    def __call__(self) -> Any:
        """Returns a new connection.

        Raises:
            Failure: the server can't be reached, or refuses.
        """
        try:
            import psycopg2
        except ImportError:
            remedy = "pip install psycopg2-binary (the extra `cluster` of pyproject.toml)"
            raise Failure(f"sweep.storage: postgresql:// needs psycopg2, which is not installed: {remedy}") from None
        deadline = time.monotonic() + self.timeout_s
        has_warned = False
        while True:
            try:
                return psycopg2.connect(self.address, connect_timeout=CONNECT_TIMEOUT_S, **KEEPALIVE)
            except psycopg2.Error as error:
                message = str(error).strip().splitlines()[0]
                database = f"the database of the study ({_without_credentials(self.address)})"
                if time.monotonic() > deadline:
                    remedy = "; the same command goes on once it is back" if self.timeout_s else ""
                    raise Failure(f"{database} cannot be reached: {message}{remedy}") from None
                if not has_warned:
                    has_warned = True
                    print(f"{database} cannot be reached, trying for {self.timeout_s:.0f} s: {message}", flush=True)
                time.sleep(RECONNECT_INTERVAL_S)


@contextlib.contextmanager
def _advisory_lock(address: str, study: str, purpose: str) -> Iterator[None]:
    """A lock among all clients of the database; the server releases it when the connection ends, however it ends."""
    name = f"sweep {study} {purpose}"
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
    with contextlib.closing(_Connect(address, RECONNECT_TIMEOUT_S if study else 0.0)()) as connection:
        connection.cursor().execute("SELECT pg_advisory_lock(%s)", (key,))
        yield


def _without_credentials(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.hostname or 'localhost'}:{parts.port or 5432}{parts.path}"


class _Journal:
    """Optuna's journal: a file that is only appended to. Heartbeats are measured by the file system's clock.

    Optuna's journal has no heartbeats: they are the modification times of files in a folder beside it.
    """

    is_shared = True

    def __init__(self, path: Path, study: str) -> None:
        self._grace_s = MISSED_HEARTBEATS * HEARTBEAT_S
        self._heartbeats = path.with_name(f"{path.name}.heartbeats")
        try:
            self._heartbeats.mkdir(parents=True, exist_ok=True)
            self.backend: BaseStorage = JournalStorage(JournalFileBackend(str(path), _RepairingLock(str(path))))
        except (OSError, ValueError) as error:
            raise Failure(f"sweep.storage: {path} can't be used as a journal: {error}") from None
        self.lock: Lock = functools.partial(_file_lock, f"{path}.{study}")

    def record_heartbeat(self, trial_id: int) -> None:
        (self._heartbeats / str(trial_id)).touch()

    def stale_trials(self, study: optuna.Study) -> set[int]:
        clock = self._heartbeats / "now"
        clock.touch()
        oldest = clock.stat().st_mtime - self._grace_s
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {trial_id(trial) for trial in running if self._last_heartbeat(trial_id(trial)) < oldest}

    def _last_heartbeat(self, trial_id: int) -> float:
        try:
            return (self._heartbeats / str(trial_id)).stat().st_mtime
        except FileNotFoundError:
            return 0.0


class _RepairingLock(JournalFileOpenLock):
    """The lock for appending to the journal; truncates an incomplete last line that a killed process left.

    Otherwise the next line would be appended to it, and the journal could no longer be read.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path

    def acquire(self) -> bool:
        is_acquired = super().acquire()
        with open(self._path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return is_acquired


@contextlib.contextmanager
def _file_lock(path: str, purpose: str) -> Iterator[None]:
    """A lock that needs nothing but exclusive creation of files, which every network file system has."""
    lock = JournalFileOpenLock(f"{path}.{purpose}")
    lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # held for too long, by a suspended process: another one took it
            lock.release()
