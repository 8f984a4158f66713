"""Tracks a run in MLflow without letting MLflow kill or delay a training.

The training only appends to a journal, a local file; a thread sends it to MLflow. What could not be sent stays in the
journal for `send_unsent`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from src.common.clock_metrics import SYSTEM
from src.common.identity import flattened
from src.common.paths import RECORD_ROOT, ROOT, sqlite_address
from src.common.retry import Backoff
from src.tracking.journal import (
    MAX_PARAM_LENGTH,
    append,
    artifacts_folder,
    clean_name,
    clean_tags,
    count_unsent,
    create,
    cut_torn_line,
    now,
    read_header,
    records,
    remove,
    shorten,
)
from src.tracking.liveness import FAILURE_TAG, is_certainly_dead, process_tags
from src.tracking.sender import MODEL_TAG, STATE_TAG, JournalSender
from src.tracking.store import one_line, resolve_store
from src.tracking.system_metrics import system_metrics

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CONFIG",
    "DATA_TAG",
    "DEFAULT_STORE",
    "DESCRIPTION",
    "MODEL_TAG",
    "PATCH",
    "STATE_TAG",
    "Report",
    "RunInfo",
    "Tracker",
    "resolve_store",
    "send_unsent",
]

log = logging.getLogger(__name__)

# Artifacts and tags of a training run, which `python -m src.reproduce` reads.
CONFIG, PATCH = "config.yaml", "dirty.patch"  # artifacts
DATA_TAG = "pipeline.data_sha256."  # followed by the split's name
DESCRIPTION = "mlflow.note.content"  # MLflow shows it above a run

DEFAULT_STORE = sqlite_address(RECORD_ROOT / "experiments" / "mlflow.db")

Status = Literal["FINISHED", "FAILED", "KILLED"]

SYSTEM_EVERY_S = 10.0  # MLflow's own interval; a shorter run has no system metrics
SEND_EVERY_S = 1.0  # one call a second carries the points of hundreds of steps
PATIENCE_S = 10.0
KILLED_PATIENCE_S = 3.0  # whoever sent SIGTERM sends SIGKILL soon


@dataclass(frozen=True)
class RunInfo:
    """What a run is in MLflow, and how it is described there.

    `identity`: of the journal; a run that was journaled under the same identity before is found and added to.
    `parent`: the identity of the journal of the run that this one is nested under.
    `is_tracked`: False makes a tracker that records nothing and writes no journal.
    """

    experiment: str
    name: str
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    identity: str | None = None
    parent: str | None = None
    is_tracked: bool = True

    @property
    def all_tags(self) -> dict[str, str]:
        """The tags, the description among them."""
        return {**self.tags, **({DESCRIPTION: self.description} if self.description else {})}


@dataclass(frozen=True)
class Report:
    """What `send_unsent` did: records sent, records still unsent, and one line for each thing that failed."""

    sent: int
    unsent: int
    problems: tuple[str, ...]


class Tracker:
    """One MLflow run, as a context manager; constructed by `start`, `resume` or `join`.

    Call those after the slow imports: the sender thread imports MLflow, and two threads that import at once slow each
    other down. The logging methods append one line to the journal and return in microseconds. They never raise because
    of MLflow; a journal that cannot be written (a full disk) is reported once and training goes on.

    `store` is an MLflow tracking URI; without it MLFLOW_TRACKING_URI, without that the SQLite database under
    `experiments/`. With `sender=False` the run is only journaled, for another process to send.
    """

    def __init__(
        self, journal: Path, store: str, logged: frozenset[tuple[str, int]] = frozenset(), *, is_tracked: bool = True
    ) -> None:
        """Opens an existing journal; `logged` are the (metric, step) pairs that it already holds."""
        self.journal = journal
        self._logged = logged
        self._params: dict[str, str] = {}
        self._file = os.open(journal, os.O_WRONLY | os.O_APPEND) if is_tracked else None
        self._closed = threading.Event()
        self._warnings: set[str] = set()
        self._has_sender = False
        self._copies = 0
        self._sender = JournalSender(journal, store)
        # A daemon: whatever MLflow does, it cannot hold up the end of the process.
        self._thread = threading.Thread(target=self._send, name="mlflow-sender", daemon=True)

    @classmethod
    def start(cls, journal: Path, info: RunInfo, *, store: str | None = None, sender: bool = True) -> Self:
        """Begins a new run and journals it at `journal`; an earlier run's unsent journal there is moved aside.

        Raises:
            OSError: `journal` cannot be created.
        """
        if not info.is_tracked:
            return cls(journal, "", is_tracked=False)
        tracker = cls._begin(journal, info, store)
        if info.identity:
            tracker.set_tags({**info.all_tags, **process_tags()})
            tracker._append({"status": "RUNNING", "time": now()})
        tracker.log_params(info.params)
        return tracker._start_sender(sender)

    @classmethod
    def resume(cls, journal: Path, info: RunInfo, *, store: str | None = None, sender: bool = True) -> Self:
        """Continues the run that `journal` holds, after a kill or a failure; without one, or after its end, `start`.

        Steps that were journaled before are not journaled again, so that replaying from a checkpoint doubles no point.
        The parameters stay those of the start; the tags are set anew.
        """
        header = read_header(journal) if info.is_tracked else None
        past = [record for _, record in records(journal, 0)] if header else []
        statuses = [record["status"] for record in past if "status" in record]
        if header is None or statuses[-1:] == ["FINISHED"]:
            return cls.start(journal, info, store=store, sender=sender)
        cut_torn_line(journal)
        logged = frozenset((key, record["step"]) for record in past for key in record.get("metrics", ()))
        tracker = cls(journal, resolve_store(store, header["store"]), logged)
        tracker.set_tags({**info.all_tags, **process_tags()})
        tracker._append({"status": "RUNNING", "time": now()})
        return tracker._start_sender(sender)

    @classmethod
    def join(
        cls, journal: Path, info: RunInfo, model_sha256: str, *, store: str | None = None, sender: bool = True
    ) -> Self:
        """Adds to the newest run of the experiment that is tagged with `model_sha256`, and keeps its status.

        The run is looked up when the journal is sent. If there is none, a new run is made, tagged so that the next
        `join` finds it, and a warning is logged.
        """
        if not info.is_tracked:
            return cls(journal, "", is_tracked=False)
        info = replace(info, tags={**info.tags, MODEL_TAG: model_sha256})
        return cls._begin(journal, info, store, joins=model_sha256)._start_sender(sender)

    @classmethod
    def _begin(cls, journal: Path, info: RunInfo, store: str | None, joins: str | None = None) -> Self:
        store = resolve_store(store, DEFAULT_STORE)
        header: dict[str, Any] = {
            "store": store,
            "experiment": info.experiment,
            "name": info.name,
            "joins": joins,
            "tags": clean_tags(info.all_tags),
            "process": process_tags(),
        }
        if info.identity:
            header["journal"] = info.identity
        if info.parent:
            header["parent"] = info.parent
        create(journal, header)
        return cls(journal, store)

    def _start_sender(self, sender: bool) -> Self:
        """Starts the sender, after the first records: a resumed run must not look like its dead process's."""
        self._has_sender = sender
        if sender:
            self._thread.start()
        return self

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records values, NaN and infinities included, at `step`, with the present time."""
        new = {
            clean: float(value)
            for key, value in metrics.items()
            if ((clean := clean_name(key)), step) not in self._logged
        }
        if new:
            self._append({"metrics": new, "step": step, "time": now()})

    def log_params(self, params: Mapping[str, object]) -> None:
        """Records parameters; nested mappings are flattened with dots.

        A value over MLflow's length limit is cut with an ellipsis, and all parameters go uncut into the artifact
        `params_full.json`.
        """
        flat: dict[str, str] = {}
        for key, value in flattened(params):
            clean = clean_name(key)
            while clean in flat:  # two names that differ only in characters that MLflow refuses
                clean += "_"
            flat[clean] = str(value)
        self._append({"params": {key: shorten(value, MAX_PARAM_LENGTH) for key, value in flat.items()}})
        self._params |= flat
        if any(len(value) > MAX_PARAM_LENGTH for value in flat.values()):
            self.log_text(json.dumps(self._params, indent=2, ensure_ascii=False), "params_full.json")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags, replacing older values; over-long ones are cut."""
        self._append({"tags": clean_tags(tags)})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Sends a file or a folder, into the run's artifact folder `folder`; it is read when it is sent, not now.

        In a temporary copy of DVC's, which is deleted after the run, a copy of it is sent.
        """
        self._append({"artifact": str(self._lasting(path)), "folder": folder})

    def log_text(self, text: str, name: str) -> None:
        """Sends `text` as the artifact `name`."""
        self._append({"text": text, "name": name})

    def log_datasets(self, datasets: list[dict[str, str]]) -> None:
        """Records the data sets that the run uses: name, digest, source_type, source, profile, context of each."""
        self._append({"datasets": datasets})

    def log_model(self, path: Path, name: str, example: Mapping[str, np.ndarray]) -> None:
        """Records an ONNX file as a model of the run; `example`: its inputs by name, for MLflow's signature."""
        arrays = {key: {"dtype": str(value.dtype), "values": value.tolist()} for key, value in example.items()}
        self._append({"model": str(self._lasting(path)), "name": clean_name(name), "example": arrays})

    def sample_system(self, interval_s: float = SYSTEM_EVERY_S) -> None:
        """Records the load of the machine every `interval_s` seconds until the run ends, from a thread."""
        step = max((step for name, step in self._logged if name.startswith(SYSTEM)), default=-1) + 1

        def sample() -> None:
            for number in itertools.count(step):
                if self._closed.wait(interval_s):
                    return
                self.log_metrics(system_metrics(), number)

        if self._file is not None:
            threading.Thread(target=sample, name="system-metrics", daemon=True).start()

    def finish(self, status: Status, patience: float = PATIENCE_S) -> None:
        """Ends the run; waits at most `patience` seconds for the sender, then warns of what is unsent and where it is.

        The journal of a FINISHED run is removed when all of it was sent; any other stays, so that `resume` can go on.
        """
        if self._file is None:
            return
        self._append({"status": status, "time": now()})
        os.close(self._file)
        self._file = None
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(patience)
        unsent = count_unsent(self.journal) if self._has_sender else 0
        if unsent:
            reason = f"not all sent within {patience:.0f} s" if self._thread.is_alive() else self._sender.failure
            log.warning(
                "%d records of this run are not in MLflow yet (%s); %s keeps them: send them with `python -m src.sync`",
                unsent,
                reason,
                self.journal,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.finish("FINISHED")
        elif isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (130, 143)):
            self.finish("KILLED", KILLED_PATIENCE_S)
        else:
            self.set_tags({FAILURE_TAG: one_line(error)})
            self.finish("FAILED")

    def _lasting(self, path: Path) -> Path:
        """The path, or a copy beside the journal where the repository is a temporary one."""
        if RECORD_ROOT == ROOT:
            return path.resolve()
        self._copies += 1
        copy = artifacts_folder(self.journal) / str(self._copies) / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, copy)
        return copy

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._file is None:  # not tracked, or finished
            return
        try:
            append(self._file, record)
        except OSError as error:
            self._warn_once(f"tracking journal {self.journal} cannot be written ({error}); what follows is not tracked")

    def _send(self) -> None:
        """The sender thread: sends, pauses, and again; the last time begins after the journal was closed."""
        backoff = Backoff(SEND_EVERY_S)
        is_failing = False
        last_tries = 2  # a server may just then have dropped an idle connection, or a database been locked
        while last_tries:
            is_closed = self._closed.is_set()
            self._sender.send()
            for problem in self._sender.problems:
                self._warn_once(problem)
            failure = self._sender.failure
            if failure and not is_failing and not is_closed:
                log.warning("MLflow cannot be reached (%s); the run goes on, %s keeps it", failure, self.journal)
            is_failing = failure is not None
            if is_closed:
                last_tries = last_tries - 1 if is_failing else 0
            self._closed.wait(backoff.pause_s(has_failed=is_failing))

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            log.warning(message)


def _remove_orphan(journal: Path, header: Mapping[str, Any]) -> None:
    """Removes a stage's journal that was sent completely, if its process is dead: no later call goes on with it."""
    if header["joins"] and is_certainly_dead(header["process"], process_tags()):
        remove(journal)


def send_unsent(folder: Path, store: str | None = None) -> Report:
    """Sends what the journals under `folder` still hold, oldest run first, and closes the runs of dead processes.

    The store is `store`, else MLFLOW_TRACKING_URI, else the one of the journal.
    """
    journals = [(header["time"], path, header) for path in folder.rglob("*.jsonl") if (header := read_header(path))]
    sent = unsent = 0
    problems: list[str] = []
    for _, journal, header in sorted(journals, key=lambda entry: entry[0]):
        if not (before := count_unsent(journal)):
            _remove_orphan(journal, header)
            continue
        sender = JournalSender(journal, resolve_store(store, header["store"]))
        sender.send()
        problems += sender.problems
        if sender.failure:
            problems.append(f"{journal}: {sender.failure}")
        after = count_unsent(journal)
        if not after:
            _remove_orphan(journal, header)
        sent += before - after
        unsent += after
    return Report(sent, unsent, tuple(problems))
