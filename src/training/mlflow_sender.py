"""From a journal to MLflow. Everything here may be done twice: after a crash it goes on from the last saved state.

Also what that needs: a store that is made whole or not at all, and an end for the runs whose process died.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from src.training.journal import State, load_state, lock_path, read_header, records, remove, save_state, shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_TAG = "pipeline.model_sha256"  # by this `join` finds the run that trained a model
STATE_TAG = "pipeline.optimizer_sha256"
FAILURE_TAG = "pipeline.failure"
JOURNAL_TAG = "pipeline.journal"  # finds a run again that was created just before a crash
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages show a run under that one
HOST_TAG = "pipeline.host"
MACHINE_TAG = "pipeline.machine"
BOOT_TAG = "pipeline.boot_id"
NAMESPACE_TAG = "pipeline.pid_namespace"
PID_TAG = "pipeline.pid"
STARTED_TAG = "pipeline.process_start"

METRICS_PER_CALL = 1000  # MLflow's own limit; a test compares it
REFUSED = "INVALID_PARAMETER_VALUE"  # MLflow's code for what no later attempt would change
LOCK_TIMEOUT_S = 10.0  # another process that sends the same journal needs seconds
# A process's start time, computed from the boot time, moves when the clock is set; a pid is not reused this soon.
CLOCK_SLACK_S = 60.0

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


class Drain:
    """Carries a journal's records to a store, from where the last drain, of whatever process, stopped.

    After each `run`, `failure` says why MLflow could not be reached (None when it was), and `problems` lists what was
    dropped because it can never be sent.
    """

    def __init__(
        self, journal: Path, store: str, alone: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> None:
        """Make one before MLflow is imported: it reads its settings only then.

        `alone` holds off whoever else may open the journal's run: journals on several machines may be of one run.
        """
        for name, value in QUIET_AND_BOUNDED.items():
            os.environ.setdefault(name, value)
        self.journal = journal
        self.store = store
        self._alone = alone
        self.failure: str | None = None
        self.problems: list[str] = []
        self._connection: MlflowClient | None = None

    def run(self) -> None:
        """Send everything that the journal holds by now; raises nothing."""
        self.failure = None
        self.problems = []
        if not self.journal.exists():  # all was sent; taking the lock would leave a stray file
            return
        try:
            with FileLock(lock_path(self.journal), timeout=LOCK_TIMEOUT_S):
                self._send_all()
        except Timeout:
            self.failure = "another process is sending it"
        except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the operating system's errors
            self.failure = one_line(error)

    def _send_all(self) -> None:
        from mlflow.exceptions import MlflowException

        header = read_header(self.journal)
        if header is None:
            return
        fresh = State(header["journal"], self.store)
        state = load_state(self.journal)
        if state is None or (state.journal, state.store) != (fresh.journal, fresh.store):
            state = fresh
        try:
            self._send_from(header, state)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST" or state.run_id is None:
                raise
            self._send_from(header, fresh)  # the store was made anew, or the run purged from it: the journal has it all

    def _send_from(self, header: Mapping[str, Any], state: State) -> None:
        connecting = self._connection is None
        client = self._connection = self._connection or connect(self.store)
        run_id, joined = state.run_id, state.joined
        if run_id is None:
            with self._alone():
                run_id, joined = self._open_run(client, header)
        record: Mapping[str, Any] = {}
        for end, record in _merge_metrics(records(self.journal, state.sent)):
            self._send(client, run_id, joined, record)
            save_state(self.journal, replace(state, run_id=run_id, joined=joined, sent=end))
        if connecting:  # after this run's own process tags are in place
            _close_dead_runs(client)
        if record.get("status") == "FINISHED" and read_header(self.journal) == header:
            remove(self.journal)

    def _open_run(self, client: MlflowClient, header: Mapping[str, Any]) -> tuple[str, bool]:
        """Find or create the journal's run; returns its id and whether it belongs to another journal."""
        experiment = _experiment_id(client, self.store, header["experiment"])
        ours = client.search_runs([experiment], f"tags.`{JOURNAL_TAG}` = '{header['journal']}'", max_results=1)
        if ours:
            return ours[0].info.run_id, False
        if header["joins"]:
            made_it = f"tags.`{MODEL_TAG}` = '{header['joins']}'"
            newest = client.search_runs([experiment], made_it, order_by=["attributes.start_time DESC"], max_results=1)
            if newest:
                run_id = newest[0].info.run_id
                self._send(client, run_id, True, {"tags": header["tags"]})
                return run_id, True
            self.problems.append(
                f"no run in the experiment {header['experiment']} is tagged {MODEL_TAG}={header['joins'][:12]}...; "
                f"a new run {header['name']} takes what was measured"
            )
        tags = {**header["tags"], **header["process"], JOURNAL_TAG: header["journal"], "mlflow.user": _user()}
        if parent := header.get("parent"):
            tags[PARENT_TAG] = self._run_of(client, experiment, parent)
        run = client.create_run(experiment, header["time"], tags, header["name"])
        return run.info.run_id, False

    def _run_of(self, client: MlflowClient, experiment: str, journal: str) -> str:
        """The id of the run of another journal, deleted or not; raises where that has not been sent yet."""
        from mlflow.entities import ViewType

        wanted = f"tags.`{JOURNAL_TAG}` = '{journal}'"
        found = client.search_runs([experiment], wanted, run_view_type=ViewType.ALL, max_results=1)
        if not found:
            raise LookupError("the run that it belongs under is not in MLflow yet")
        return str(found[0].info.run_id)

    def _send(self, client: MlflowClient, run_id: str, joined: bool, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        match record:
            case {"points": points}:
                self._log_batch(client, run_id, metrics=[Metric(*point) for point in points])
            case {"params": params}:
                self._log_batch(client, run_id, params=[Param(key, value) for key, value in params.items()])
            case {"tags": tags}:
                self._log_batch(client, run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            case {"status": "RUNNING"}:
                client.update_run(run_id, status="RUNNING")
            case {"status": status, "time": ended} if not joined:  # a joined run keeps the status of its training
                client.set_terminated(run_id, status, ended)
            case {"artifact": path} if not Path(path).exists():
                self.problems.append(f"artifact {path} vanished before it could be sent to MLflow")
            case {"artifact": path, "folder": folder}:
                with self._dropping(f"artifact {path}"):
                    client.log_artifact(run_id, path, folder)
            case {"text": text, "name": name}:
                with self._dropping(f"artifact {name}"):
                    client.log_text(run_id, text, name)
            case {"damaged": line}:
                self.problems.append(f"{self.journal} has a damaged line, which is left out: {shorten(line, 60)}")

    def _log_batch(self, client: MlflowClient, run_id: str, **entities: Any) -> None:
        """Send a list of metrics, params or tags; if MLflow refuses them, each alone, to lose only the one at fault.

        The client itself splits what is over MLflow's 1000 metrics or 100 params or tags a call. A parameter that the
        run has already, with the same value, is no fault to MLflow; with another value it is.
        """
        from mlflow.exceptions import MlflowException

        try:
            client.log_batch(run_id, **entities)
        except MlflowException as error:
            if error.error_code != REFUSED:
                raise
            ((kind, items),) = entities.items()
            for item in items:
                one: dict[str, Any] = {kind: [item]}
                with self._dropping(f"{kind} {item.key}"):
                    client.log_batch(run_id, **one)

    @contextlib.contextmanager
    def _dropping(self, what: str) -> Iterator[None]:
        """Pass over what MLflow refuses for what it is, and note it as a problem."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code != REFUSED:
                raise
            self.problems.append(f"MLflow refuses {what}: {one_line(error)}")


def _merge_metrics(found: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Merge metric records that follow each other into {"points": (key, value, time, step) of one call}."""
    points: list[tuple[str, float, int, int]] = []
    reached = 0
    for end, record in found:
        metrics = record.get("metrics", {})
        if points and (not metrics or len(points) + len(metrics) > METRICS_PER_CALL):
            yield reached, {"points": points}
            points = []
        if metrics:
            points += [(key, value, record["time"], record["step"]) for key, value in metrics.items()]
        else:
            yield end, record
        reached = end
    if points:
        yield reached, {"points": points}


# --- the store --------------------------------------------------------------------------------------------------------


def resolve_store(store: str | None, otherwise: str) -> str:
    """The tracking URI to use: `store`, else MLFLOW_TRACKING_URI, else `otherwise`.

    A relative SQLite path is made absolute: the journal may be sent from elsewhere.
    """
    store = store or os.environ.get("MLFLOW_TRACKING_URI") or otherwise
    database = _sqlite_path(store)
    return store if database is None else store.partition(":///")[0] + f":///{database}"


def connect(store: str) -> MlflowClient:
    """A client of `store`; a SQLite database is first made, whole or not at all, by one process while others wait."""
    from mlflow import MlflowClient

    database = _sqlite_path(store)
    if database is None:
        return MlflowClient(store)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        if not database.exists():
            with tempfile.TemporaryDirectory(prefix=f"{database.name}.", dir=database.parent) as workshop:
                fresh = Path(workshop, database.name)
                MlflowClient(f"sqlite:///{fresh}").search_experiments(max_results=1)
                fresh.replace(database)
        client = MlflowClient(store)
        client.search_experiments(max_results=1)
    return client


def _experiment_id(client: MlflowClient, store: str, name: str) -> str:
    """Find or create an experiment; a SQLite store's artifacts lie beside the database, not where the process runs."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    database = _sqlite_path(store)
    artifacts = None
    if database is not None:
        artifacts = database.with_name(database.stem if database.suffix else f"{database.name}-artifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment_id(client, store, name)  # another process was faster


def _sqlite_path(store: str) -> Path | None:
    scheme, _, path = store.partition(":///")
    return Path(path).absolute() if scheme.startswith("sqlite") else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def one_line(error: BaseException) -> str:
    """The error's kind and message in one line of at most 300 characters, without credentials of an address in it."""
    message = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))
    return shorten(f"{type(error).__name__}: {message}" if message else type(error).__name__, 300)


# --- runs whose process is dead ---------------------------------------------------------------------------------------


def _close_dead_runs(client: MlflowClient) -> None:
    """Set to KILLED the RUNNING runs whose process, on this machine, is certainly dead; leave all others alone."""
    here = process_tags()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    candidates = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{here[HOST_TAG]}'"
    for run in client.search_runs(experiments, candidates):
        if _is_certainly_dead(run.data.tags, here):
            client.set_tag(run.info.run_id, FAILURE_TAG, "the process ended without a word (killed, or power was lost)")
            client.set_terminated(run.info.run_id, "KILLED")


def _is_certainly_dead(tags: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether the process that `tags` describe is gone, as seen from the process that `here` describes."""
    try:
        if (tags[HOST_TAG], tags[MACHINE_TAG]) != (here[HOST_TAG], here[MACHINE_TAG]):
            return False
        if tags[BOOT_TAG] != here[BOOT_TAG]:
            return True
        if tags[NAMESPACE_TAG] != here[NAMESPACE_TAG]:
            return False  # another container's pids mean nothing here
        process = psutil.Process(int(tags[PID_TAG]))
        reused = abs(process.create_time() - float(tags[STARTED_TAG])) > CLOCK_SLACK_S
        return bool(reused or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (KeyError, ValueError, psutil.AccessDenied):
        return False


def process_tags() -> dict[str, str]:
    """Tags that say which process a run belongs to. The machine's id is hashed: it is nobody's business."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {
        HOST_TAG: socket.gethostname(),
        MACHINE_TAG: hashlib.sha256(_read("/etc/machine-id").encode()).hexdigest()[:12],
        BOOT_TAG: _read("/proc/sys/kernel/random/boot_id"),
        NAMESPACE_TAG: namespace,
        PID_TAG: str(os.getpid()),
        STARTED_TAG: f"{psutil.Process().create_time():.2f}",
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
