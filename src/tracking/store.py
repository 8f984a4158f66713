"""The MLflow store: which one, its client, and the atomic creation of a SQLite database."""

from __future__ import annotations

import contextlib
import getpass
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from src.common.credentials import masked
from src.common.paths import sqlite_address
from src.tracking.journal import shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

# MLflow's defaults retry a dead server for 246 s, phone home, and write to the terminal. The sender reports errors.
QUIET_AND_BOUNDED = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def resolve_store(store: str | None, default: str) -> str:
    """The tracking URI to use: `store`, else MLFLOW_TRACKING_URI, else `default`.

    A relative SQLite path is made absolute: the journal may be sent from elsewhere.
    """
    store = store or os.environ.get("MLFLOW_TRACKING_URI") or default
    database = _sqlite_path(store)
    if database is None:
        return store
    scheme, _, path = sqlite_address(database).partition(":///")
    if not store.startswith("sqlite:"):
        scheme = store.partition(":///")[0]
    return f"{scheme}:///{path}{_query(store)}"


def connect(store: str) -> MlflowClient:
    """A client of `store`; a missing SQLite database is first created atomically, by one process while others wait."""
    from mlflow import MlflowClient

    database = _sqlite_path(store)
    if database is None:
        return MlflowClient(store)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        if not database.exists():
            with tempfile.TemporaryDirectory(prefix=f"{database.name}.", dir=database.parent) as folder:
                fresh = Path(folder, database.name)
                MlflowClient(sqlite_address(fresh)).search_experiments(max_results=1)
                fresh.replace(database)
        client = MlflowClient(store)
        _follow_move(client, database)
    return client


def experiment_id(client: MlflowClient, store: str, name: str, problems: list[str]) -> str:
    """Finds, restores or creates an experiment; what was restored is added to `problems`.

    A SQLite store's artifacts lie beside the database, not in the working folder.
    """
    from mlflow.exceptions import MlflowException

    if experiment := client.get_experiment_by_name(name):
        restore_experiment(client, experiment, problems)
        return str(experiment.experiment_id)
    database = _sqlite_path(store)
    artifacts = None if database is None else _artifacts_of(database).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment_id(client, store, name, problems)  # another process created it first


def restore_experiment(client: MlflowClient, experiment: Experiment, problems: list[str]) -> None:
    """Restores a deleted experiment, whose name no other one can have, with its runs, and adds a line to `problems`."""
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        problems.append(
            f"the experiment {experiment.name} was deleted in MLflow: restored with its runs, since a run belongs to it"
        )


def _artifacts_of(database: Path) -> Path:
    """The folder of a SQLite store's artifacts."""
    return database.with_name(database.stem if database.suffix else f"{database.name}-artifacts")


def _follow_move(client: MlflowClient, database: Path) -> None:
    """Corrects the artifacts' addresses in a database that was renamed, copied or moved together with its artifacts.

    An address counts as the store's own if it ends as this store's does: a folder and the artifacts' name in it. The
    tables are MLflow's private ones (checked with 3.5 and later); MLflow has no call that changes an address.
    """
    from mlflow.entities import ViewType

    new = _artifacts_of(database)
    tables = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
    for experiment in client.search_experiments(ViewType.ALL):
        old = experiment.artifact_location
        path = Path(unquote(urlsplit(old).path))
        if not old.startswith("file://") or path == new or path.parts[-2:] != new.parts[-2:]:
            continue
        with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection, connection:
            for table, column in tables.items():
                moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
                connection.execute(moved, (new.as_uri(), len(old) + 1, len(old), old))


def _sqlite_path(store: str) -> Path | None:
    scheme, _, path = store.partition(":///")
    return Path(unquote(path.partition("?")[0])).absolute() if scheme.startswith("sqlite") else None


def _query(store: str) -> str:
    """SQLAlchemy's options at the end of a store's address, from the question mark on."""
    _, mark, options = store.partition("?")
    return mark + options


def user_name() -> str:
    """The user's name; "unknown" for a container's user without one."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def one_line(error: BaseException) -> str:
    """The error's kind and message in one line of at most 300 characters, credentials masked."""
    message = masked(" ".join(str(error).split()))
    return shorten(f"{type(error).__name__}: {message}" if message else type(error).__name__, 300)
