"""The MLflow store: which one, its client, and the atomic creation of a SQLite database."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from filelock import FileLock

from src.common.credentials import masked
from src.common.paths import sqlite_address
from src.tracking.journal import shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
    return store.partition(":///")[0] + sqlite_address(database).removeprefix("sqlite") + _query(store)


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
        client.search_experiments(max_results=1)
    return client


def experiment_id(client: MlflowClient, store: str, name: str) -> str:
    """Finds or creates an experiment; a SQLite store's artifacts lie beside the database, not in the working folder."""
    from mlflow.exceptions import MlflowException

    if experiment := client.get_experiment_by_name(name):
        return str(experiment.experiment_id)
    database = _sqlite_path(store)
    artifacts = None
    if database is not None:
        artifacts = database.with_name(database.stem if database.suffix else f"{database.name}-artifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment_id(client, store, name)  # another process created it first


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
