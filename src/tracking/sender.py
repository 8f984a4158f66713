"""Sends a journal to MLflow. Every step may be repeated: after a crash it continues from the last saved state."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from src.tracking.journal import State, load_state, lock_path, read_header, records, remove, save_state, shorten
from src.tracking.liveness import close_dead_runs
from src.tracking.logged_model import send_model
from src.tracking.store import QUIET_AND_BOUNDED, connect, experiment_id, one_line, restore_experiment, user_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

MODEL_TAG = "pipeline.model_sha256"  # `join` finds the run that trained a model by it
STATE_TAG = "pipeline.optimizer_sha256"
JOURNAL_TAG = "pipeline.journal"  # finds a run that was created just before a crash
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: nests a run under that one in its pages

METRICS_PER_CALL = 1000  # MLflow's own limit; a test compares it

REFUSED = "INVALID_PARAMETER_VALUE"  # MLflow's code for what no later attempt would change

LOCK_TIMEOUT_S = 10.0  # another process that sends the same journal needs seconds


class JournalSender:
    """Sends a journal's records to a store, from where the last sender, of whatever process, stopped.

    After each `send`, `failure` says why MLflow could not be reached (None when it was), and `problems` lists what was
    dropped because it can never be sent.
    """

    def __init__(
        self, journal: Path, store: str, run_lock: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> None:
        """Sets MLflow's environment variables, which MLflow reads when it is imported: construct it before.

        `run_lock` is held while the journal's run is looked up or created: journals on several machines may belong to
        one run.
        """
        for name, value in QUIET_AND_BOUNDED.items():
            os.environ.setdefault(name, value)
        self.journal = journal
        self.store = store
        self._run_lock = run_lock
        self.failure: str | None = None
        self.problems: list[str] = []
        self._connection: MlflowClient | None = None

    def send(self) -> None:
        """Sends everything that the journal holds by now; raises nothing."""
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
            if state.run_id is None:
                raise
            if error.error_code == REFUSED and self._connection and self._restore(self._connection, state.run_id):
                self._send_from(header, load_state(self.journal) or state)
                return
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._send_from(header, fresh)  # the store was made anew, or the run purged from it: the journal has it all

    def _send_from(self, header: Mapping[str, Any], state: State) -> None:
        connecting = self._connection is None
        client = self._connection = self._connection or connect(self.store)
        run_id, joined = state.run_id, state.joined
        if run_id is None:
            with self._run_lock():
                run_id, joined = self._open_run(client, header)
        elif connecting:
            self._restore(client, run_id)
        record: Mapping[str, Any] = {}
        for end, record in _merge_metrics(records(self.journal, state.sent)):
            self._send(client, run_id, joined, record)
            save_state(self.journal, replace(state, run_id=run_id, joined=joined, sent=end))
        if connecting:  # after this run's own process tags are in place
            close_dead_runs(client)
        # A stage's journal is not resumed, however the stage ended.
        is_over = record.get("status") == "FINISHED" or ("status" in record and header["joins"])
        if is_over and read_header(self.journal) == header:
            remove(self.journal)

    def _restore(self, client: MlflowClient, run_id: str) -> bool:
        """Restores a run that was deleted on MLflow's page while it goes on here; whether it was deleted."""
        run = client.get_run(run_id)
        if run.info.lifecycle_stage != "deleted":
            return False
        restore_experiment(client, client.get_experiment(run.info.experiment_id), self.problems)
        if client.get_run(run_id).info.lifecycle_stage == "deleted":
            client.restore_run(run_id)
            self.problems.append(f"the run {run.info.run_name} was deleted in MLflow: restored, since it goes on")
        return True

    def _open_run(self, client: MlflowClient, header: Mapping[str, Any]) -> tuple[str, bool]:
        """Finds or creates the journal's run; returns its id and whether it belongs to another journal."""
        experiment = experiment_id(client, self.store, header["experiment"], self.problems)
        own_runs = client.search_runs([experiment], f"tags.`{JOURNAL_TAG}` = '{header['journal']}'", max_results=1)
        if own_runs:
            return own_runs[0].info.run_id, False
        if header["joins"]:
            of_model = f"tags.`{MODEL_TAG}` = '{header['joins']}'"
            newest = client.search_runs([experiment], of_model, order_by=["attributes.start_time DESC"], max_results=1)
            if newest:
                run_id = newest[0].info.run_id
                self._send(client, run_id, True, {"tags": header["tags"]})
                return run_id, True
            self.problems.append(
                f"no run in the experiment {header['experiment']} is tagged {MODEL_TAG}={header['joins'][:12]}...; "
                f"a new run {header['name']} takes what was measured"
            )
        tags = {**header["tags"], **header["process"], JOURNAL_TAG: header["journal"], "mlflow.user": user_name()}
        if parent := header.get("parent"):
            tags[PARENT_TAG] = self._run_of(client, experiment, parent)
        run = client.create_run(experiment, header["time"], tags, header["name"])
        return run.info.run_id, False

    def _run_of(self, client: MlflowClient, experiment: str, journal: str) -> str:
        """The id of the run of another journal, deleted or not.

        Raises:
            LookupError: that journal has not been sent yet.
        """
        from mlflow.entities import ViewType

        of_journal = f"tags.`{JOURNAL_TAG}` = '{journal}'"
        runs = client.search_runs([experiment], of_journal, run_view_type=ViewType.ALL, max_results=1)
        if not runs:
            raise LookupError("its parent run is not in MLflow yet")
        return str(runs[0].info.run_id)

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
            case {"datasets": datasets}:
                with self._dropping("the data sets"):
                    client.log_inputs(run_id, [_dataset(**dataset) for dataset in datasets])
            case {"model": path} if not Path(path).exists():
                self.problems.append(f"model {path} vanished before it could be sent to MLflow")
            case {"model": path}:
                with self._dropping(f"model {path}"):
                    send_model(client, run_id, record)
            case {"text": text, "name": name}:
                with self._dropping(f"artifact {name}"):
                    client.log_text(run_id, text, name)
            case {"damaged": line}:
                self.problems.append(f"{self.journal} has a damaged line, which is left out: {shorten(line, 60)}")

    def _log_batch(self, client: MlflowClient, run_id: str, **entities: Any) -> None:
        """Sends a list of metrics, params or tags; if MLflow refuses it, one by one, to lose only the one at fault.

        The client itself splits what is over MLflow's 1000 metrics or 100 params or tags a call. A parameter that the
        run has already is accepted with the same value and refused with another one.
        """
        from mlflow.exceptions import MlflowException

        try:
            client.log_batch(run_id, **entities)
        except MlflowException as error:
            if error.error_code != REFUSED:
                raise
            if self._restore(client, run_id):
                self._log_batch(client, run_id, **entities)
                return
            ((kind, items),) = entities.items()
            for item in items:
                one: dict[str, Any] = {kind: [item]}
                with self._dropping(f"{kind} {item.key}"):
                    client.log_batch(run_id, **one)

    @contextlib.contextmanager
    def _dropping(self, what: str) -> Iterator[None]:
        """Skips what MLflow refuses as invalid, and notes it as a problem."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code != REFUSED:
                raise
            self.problems.append(f"MLflow refuses {what}: {one_line(error)}")


def _dataset(*, context: str, **fields: str) -> DatasetInput:
    """A data set as MLflow's entity; `context`: what the run uses it for."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    return DatasetInput(Dataset(**fields), [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _merge_metrics(entries: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Merges consecutive metric records into {"points": (key, value, time, step) of one call}."""
    points: list[tuple[str, float, int, int]] = []
    last_end = 0
    for end, record in entries:
        metrics = record.get("metrics", {})
        if points and (not metrics or len(points) + len(metrics) > METRICS_PER_CALL):
            yield last_end, {"points": points}
            points = []
        if metrics:
            points += [(key, value, record["time"], record["step"]) for key, value in metrics.items()]
        else:
            yield end, record
        last_end = end
    if points:
        yield last_end, {"points": points}
