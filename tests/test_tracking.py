"""The tracker and its journal with real MLflow stores, a real server and killed processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from src.common.paths import sqlite_address
from src.tracking import journal, liveness, provenance, sender
from src.tracking import store as tracking_store
from src.tracking import tracker as tracking
from src.tracking.tracker import RunInfo, Tracker, send_unsent

ROOT = Path(__file__).resolve().parents[1]
UNREACHABLE = "http://127.0.0.1:9"  # the discard port refuses connections immediately


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the variables with which the project imports MLflow; removes a server of the user's environment."""
    for name, value in tracking_store.QUIET_AND_BOUNDED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store for the module, in a folder whose name needs quoting in a URI."""
    path = tmp_path_factory.mktemp("a store, 100%") / "mlflow.db"
    tracking_store.connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(database: Path) -> str:
    return f"sqlite:///{database}"


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of a run whose experiment is named after the test."""
    return {
        "journal": tmp_path / "work" / "mlflow.jsonl",
        "info": RunInfo(request.node.name, "a run", {"seed": 7}, {"kind": "test"}),
    }


def changed(run: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The arguments of a run with some fields of its info replaced."""
    return run | {"info": replace(run["info"], **changes)}


def experiment_of(run: dict[str, Any]) -> str:
    name: str = run["info"].experiment
    return name


def tracked_runs(store: str, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    entity = client.get_experiment_by_name(experiment)
    return list(client.search_runs([entity.experiment_id], order_by=["attributes.start_time"])) if entity else []


def only_run(store: str, experiment: str) -> Any:
    (tracked,) = tracked_runs(store, experiment)
    return tracked


def history(store: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((point.step, point.value) for point in MlflowClient(store).get_metric_history(run_id, metric))


def artifact(store: str, run_id: str, name: str, folder: Path) -> str:
    from mlflow import MlflowClient

    return Path(MlflowClient(store).download_artifacts(run_id, name, str(folder))).read_text()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def child(code: str, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """A Python process that runs `code`, with this repository importable."""
    environment = {name: value for name, value in os.environ.items() if name not in tracking_store.QUIET_AND_BOUNDED}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_sent_completely_and_its_journal_removed(store: str, run: dict[str, Any], tmp_path: Path) -> None:
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    before = time.time() * 1000
    with Tracker.start(**changed(run, description="why it was run"), store=store) as tracker:
        for step in range(1500):  # more than the limit of one call
            tracker.log_metrics({"loss": 1 / (step + 1), "train/accuracy": step / 1500}, step)
        tracker.log_metrics({"odd": math.nan}, 0)
        tracker.log_metrics({"odd": math.inf}, 1)
        tracker.log_metrics({"odd": -math.inf}, 2)
        tracker.set_tags({"kind": "changed", "long": "x" * 9000})
        tracker.log_artifact(picture, "plots")
        tracker.log_text("lr: 0.1\n", "config.yaml")
        tracker.finish("FINISHED", patience=60)

    tracked = only_run(store, experiment_of(run))
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "a run"
    assert before - 1 <= tracked.info.start_time <= tracked.info.end_time <= time.time() * 1000
    assert tracked.data.params == {"seed": "7"}
    assert tracked.data.tags["kind"] == "changed"
    assert tracked.data.tags["mlflow.note.content"] == "why it was run"
    assert len(tracked.data.tags["long"]) == journal.MAX_TAG_LENGTH
    assert history(store, tracked.info.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(1500)]
    assert len(history(store, tracked.info.run_id, "train/accuracy")) == 1500
    odd = [value for _, value in history(store, tracked.info.run_id, "odd")]
    assert math.isnan(odd[0]) and odd[1] > 1e308 and odd[2] < -1e308
    assert artifact(store, tracked.info.run_id, "plots/picture.txt", tmp_path) == "pixels"
    assert artifact(store, tracked.info.run_id, "config.yaml", tmp_path) == "lr: 0.1\n"
    assert not run["journal"].parent.exists()


def test_artifacts_are_stored_beside_the_database(store: str, database: Path, run: dict[str, Any]) -> None:
    with Tracker.start(**run, store=store) as tracker:
        tracker.log_text("text", "note.txt")
    tracked = only_run(store, experiment_of(run))
    assert (database.parent / "mlflow" / tracked.info.run_id / "artifacts" / "note.txt").read_text() == "text"


def test_metrics_carry_the_time_of_logging(store: str, run: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    with Tracker.start(**run, store=store) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
        time.sleep(0.2)
        tracker.log_metrics({"loss": 0.5}, 1)
    first, second = MlflowClient(store).get_metric_history(only_run(store, experiment_of(run)).info.run_id, "loss")
    assert 190 <= abs(second.timestamp - first.timestamp) < 5000


@pytest.mark.parametrize(
    ("error", "status", "failure"),
    [
        (ValueError("a shape\nis wrong"), "FAILED", "ValueError: a shape is wrong"),
        (SystemExit(2), "FAILED", "SystemExit: 2"),
        (SystemExit(143), "KILLED", None),
        (KeyboardInterrupt(), "KILLED", None),
        (SystemExit(0), "FINISHED", None),
    ],
    ids=["exception", "exit-2", "sigterm", "ctrl-c", "exit-0"],
)
def test_the_exception_determines_the_status(
    store: str, run: dict[str, Any], error: BaseException, status: str, failure: str | None
) -> None:
    with pytest.raises(type(error)), Tracker.start(**run, store=store):
        raise error
    wait_until(lambda: only_run(store, experiment_of(run)).info.status == status)
    assert only_run(store, experiment_of(run)).data.tags.get(liveness.FAILURE_TAG) == failure
    assert run["journal"].exists() is (status != "FINISHED"), "a run that can be resumed keeps its journal"


# --- limits of MLflow -------------------------------------------------------------------------------------------------


def test_the_limits_are_those_of_the_installed_mlflow() -> None:
    from mlflow.utils import validation

    assert journal.MAX_PARAM_LENGTH == validation.MAX_PARAM_VAL_LENGTH
    assert journal.MAX_TAG_LENGTH == validation.MAX_TAG_VAL_LENGTH
    assert journal.MAX_NAME_LENGTH == validation.MAX_ENTITY_KEY_LENGTH
    assert sender.METRICS_PER_CALL == validation.MAX_METRICS_PER_BATCH


def test_nested_long_many_and_oddly_named_parameters_are_logged(
    store: str, run: dict[str, Any], tmp_path: Path
) -> None:
    long = "0123456789" * 1000
    params: dict[str, object] = {
        "model": {"name": "resnet", "optimizer": {"lr": 0.1, "betas": [0.9, 0.999]}, "head": {}},
        "resume": None,
        "a+b": 1,
        "a*b": 2,
        "/absolute": 3,
        "..": 4,
        "a//b": 5,
        "n" * 300: 6,
        "vocabulary": long,
        **{f"many.{index}": index for index in range(250)},
    }
    with Tracker.start(**changed(run, params=params), store=store):
        pass
    tracked = only_run(store, experiment_of(run))
    logged = tracked.data.params
    assert logged["model.optimizer.lr"] == "0.1"
    assert logged["model.optimizer.betas"] == "[0.9, 0.999]"
    assert logged["model.head"] == "{}"
    assert logged["resume"] == "None"
    assert [logged[name] for name in ("a_b", "a_b_", "_absolute", "_", "a__b")] == ["1", "2", "3", "4", "5"]
    assert logged["n" * 250] == "6"
    assert logged["vocabulary"] == long[:5999] + "…"
    assert len(logged) == 262
    complete = json.loads(artifact(store, tracked.info.run_id, "params_full.json", tmp_path))
    assert complete["vocabulary"] == long
    assert complete["many.249"] == "249"


def test_records_that_mlflow_refuses_are_named_and_the_others_sent(
    store: str, run: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker.start(**run, store=store) as tracker:
        tracker.log_params({"seed": 8, "other": 1})  # MLflow does not let a parameter change
        tracker.log_artifact(tmp_path / "never-written.png")
        tracker.log_metrics({"loss": 0.5}, 0)
    tracked = only_run(store, experiment_of(run))
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params == {"seed": "7", "other": "1"}
    assert tracked.data.metrics == {"loss": 0.5}
    assert "MLflow refuses params seed" in caplog.text
    assert "never-written.png vanished" in caplog.text


# --- kills and resumes ------------------------------------------------------------------------------------------------


def test_a_killed_run_is_resumed_with_each_point_once(store: str, run: dict[str, Any], tmp_path: Path) -> None:
    killed = child(
        """
        import os, sys, time
        from pathlib import Path
        from src.tracking.journal import load_state
        from src.tracking.tracker import RunInfo, Tracker

        journal, store, experiment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
        tracker = Tracker.start(journal, RunInfo(experiment, "a run", {"seed": 7}, {"kind": "test"}), store=store)
        for step in range(30):
            tracker.log_metrics({"loss": 1.0 / (step + 1)}, step)
        while not (state := load_state(journal)) or state.sent < journal.stat().st_size:
            time.sleep(0.05)
        for step in range(30, 40):
            tracker.log_metrics({"loss": 1.0 / (step + 1)}, step)
        os.write(tracker._file, b'{"metrics": {"loss": 0.0')   # killed while writing a line
        os._exit(9)
        """,
        run["journal"],
        store,
        experiment_of(run),
        cwd=tmp_path,
    )
    assert killed.communicate(timeout=60) == ("", ""), "no output"
    assert killed.returncode == 9
    before = only_run(store, experiment_of(run))
    assert before.info.status == "RUNNING"

    with Tracker.resume(**changed(run, params={"seed": 8}, tags={"kind": "resumed"}), store=store) as tracker:
        for step in range(20, 50):  # from the last checkpoint on
            tracker.log_metrics({"loss": 1.0 / (step + 1)}, step)

    tracked = only_run(store, experiment_of(run))
    assert tracked.info.run_id == before.info.run_id
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params == {"seed": "7"}
    assert tracked.data.tags["kind"] == "resumed"
    assert tracked.data.tags[liveness.PID_TAG] == str(os.getpid())
    assert liveness.FAILURE_TAG not in tracked.data.tags, "a resumed run is not closed because of its dead process"
    assert history(store, tracked.info.run_id, "loss") == [(step, 1.0 / (step + 1)) for step in range(50)]


def test_a_crash_before_saving_the_state_duplicates_no_point(store: str, run: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker.start(**run, store=store) as tracker:
        for step in range(10):
            tracker.log_metrics({"loss": math.nan if step == 3 else step}, step)
        raise KeyboardInterrupt
    wait_until(lambda: only_run(store, experiment_of(run)).info.status == "KILLED")
    wait_until(lambda: not tracker._thread.is_alive())
    journal.state_path(run["journal"]).unlink()  # as after a crash before it was written

    report = send_unsent(run["journal"].parent, store)

    assert report.unsent == 0 and report.problems == ()
    steps = [step for step, _ in history(store, only_run(store, experiment_of(run)).info.run_id, "loss")]
    assert steps == list(range(10))


def test_resuming_without_a_journal_starts_a_run(store: str, run: dict[str, Any]) -> None:
    with Tracker.resume(**run, store=store) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
    assert only_run(store, experiment_of(run)).data.params == {"seed": "7"}


def test_resuming_a_finished_run_starts_another(store: str, run: dict[str, Any]) -> None:
    Tracker.start(**run, store=UNREACHABLE, sender=False).finish("FINISHED")  # unsent: the journal remains
    with Tracker.resume(**changed(run, name="again"), store=store) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
    assert send_unsent(run["journal"].parent, store).unsent == 0
    metrics = {tracked.info.run_name: tracked.data.metrics for tracked in tracked_runs(store, experiment_of(run))}
    assert metrics == {"a run": {}, "again": {"loss": 1.0}}


def test_only_runs_of_dead_processes_are_closed(store: str, run: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    ended = subprocess.Popen(["true"])
    ended.wait()
    own = liveness.process_tags()
    cases = {
        "no such process": own | {liveness.PID_TAG: str(ended.pid)},
        "pid used again": own | {liveness.STARTED_TAG: "1000000000.00"},
        "before the last boot": own | {liveness.BOOT_TAG: "another"},
        "alive": own,
        "another host": own | {liveness.HOST_TAG: "elsewhere", liveness.BOOT_TAG: "another"},
        "another machine of that name": own | {liveness.MACHINE_TAG: "another", liveness.BOOT_TAG: "another"},
        "another container": own | {liveness.NAMESPACE_TAG: "another", liveness.PID_TAG: str(ended.pid)},
        "not ours": {liveness.HOST_TAG: own[liveness.HOST_TAG]},
    }
    client = MlflowClient(store)
    experiment = client.create_experiment("an earlier experiment")
    ids = {name: client.create_run(experiment, tags=tags).info.run_id for name, tags in cases.items()}

    with Tracker.start(**run, store=store):
        pass

    killed = {name for name, run_id in ids.items() if client.get_run(run_id).info.status == "KILLED"}
    assert killed == {"no such process", "pid used again", "before the last boot"}
    assert all(client.get_run(run_id).info.status == "RUNNING" for name, run_id in ids.items() if name not in killed)


# --- joining ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_joins_the_run_of_its_model(store: str, run: dict[str, Any], tmp_path: Path) -> None:
    for name in ("an older run", "the run"):
        with Tracker.start(**changed(run, name=name), store=store) as tracker:
            tracker.set_tags({tracking.MODEL_TAG: "ab" * 32})
        time.sleep(0.01)
    info = RunInfo(experiment_of(run), "evaluation")
    with Tracker.join(
        tmp_path / "evaluate.jsonl", replace(info, tags={"split": "test"}), "ab" * 32, store=store
    ) as tracker:
        tracker.log_metrics({"test/accuracy": 0.875}, 0)
    with pytest.raises(RuntimeError), Tracker.join(tmp_path / "export.jsonl", info, "ab" * 32, store=store):
        raise RuntimeError("the exported model differs")

    older, newer = tracked_runs(store, experiment_of(run))
    assert older.data.metrics == {}
    assert newer.info.run_name == "the run"
    assert newer.data.metrics == {"test/accuracy": 0.875}
    assert newer.data.tags["split"] == "test"
    assert newer.data.tags[liveness.FAILURE_TAG] == "RuntimeError: the exported model differs"
    assert newer.info.status == "FINISHED", "the training had finished"


def test_repeated_parameters_are_not_reported(
    store: str, run: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params: dict[str, object] = {"seed": 7, "nested": {"none": None}, "nan": math.nan, "empty": "", "long": "x" * 7000}
    with pytest.raises(KeyboardInterrupt), Tracker.start(**changed(run, params=params), store=store):
        raise KeyboardInterrupt
    with Tracker.resume(**run, store=store) as tracker:
        tracker.log_params(params | {"resumed": True})
        tracker.set_tags({tracking.MODEL_TAG: "ef" * 32})
    joined = Tracker.join(
        tmp_path / "evaluate.jsonl", RunInfo(experiment_of(run), "evaluation"), "ef" * 32, store=store
    )
    with joined as tracker:
        tracker.log_params(params | {"joined": True})

    logged = only_run(store, experiment_of(run)).data.params
    assert (logged["resumed"], logged["joined"], len(logged)) == ("True", "True", 7)
    assert "MLflow refuses" not in caplog.text


def test_joining_an_unknown_model_creates_a_run_and_logs_it(
    store: str, run: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = RunInfo(experiment_of(run), "evaluation")
    for stage in ("evaluate", "export"):
        with Tracker.join(tmp_path / f"{stage}.jsonl", info, "cd" * 32, store=store) as tracker:
            tracker.log_metrics({f"{stage}/seconds": 1.0}, 0)
    tracked = only_run(store, experiment_of(run))
    assert tracked.info.run_name == "evaluation" and tracked.info.status == "FINISHED"
    assert tracked.data.metrics == {"evaluate/seconds": 1.0, "export/seconds": 1.0}
    assert caplog.text.count("a new run evaluation takes what was measured") == 1


# --- unsent journals --------------------------------------------------------------------------------------------------


def test_an_unreachable_store_is_reported_with_the_journal(store: str, run: dict[str, Any]) -> None:
    Tracker.start(**run, store=UNREACHABLE, sender=False).finish("FINISHED")
    report = send_unsent(run["journal"].parent, UNREACHABLE)
    assert (report.sent, report.unsent) == (0, 2)
    (problem,) = report.problems
    assert str(run["journal"]) in problem
    assert send_unsent(run["journal"].parent, store) == tracking.Report(2, 0, ())


def test_a_new_run_keeps_the_unsent_journal_of_the_previous_one(store: str, run: dict[str, Any]) -> None:
    for name in ("first", "second"):
        Tracker.start(**changed(run, name=name), store=UNREACHABLE, sender=False).finish("FINISHED")
    report = send_unsent(run["journal"].parent, store)
    assert (report.sent, report.unsent) == (4, 0)
    # A set: both may have the same start time.
    assert {tracked.info.run_name for tracked in tracked_runs(store, experiment_of(run))} == {"first", "second"}
    assert send_unsent(run["journal"].parent, store) == tracking.Report(0, 0, ())


def test_a_journal_is_sent_completely_to_a_new_store(store: str, database: Path, run: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker.start(**run, store=store) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
        raise KeyboardInterrupt
    wait_until(lambda: not tracker._thread.is_alive())
    state = json.loads(journal.state_path(run["journal"]).read_text())
    journal.state_path(run["journal"]).write_text(json.dumps(state | {"run_id": "0" * 32}))  # unknown to the store
    with Tracker.resume(**run, store=store) as tracker:
        tracker.log_metrics({"loss": 0.5}, 1)
    tracked = only_run(store, experiment_of(run))
    assert tracked.info.status == "FINISHED"
    assert history(store, tracked.info.run_id, "loss") == [(0, 1.0), (1, 0.5)]


def test_a_full_disk_is_reported_once_and_not_fatal(run: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker.start(**run, store=UNREACHABLE, sender=False)
    with open("/dev/full", "wb") as full:
        assert tracker._file is not None
        os.dup2(full.fileno(), tracker._file)
    tracker.log_metrics({"loss": 0.5}, 0)
    tracker.log_metrics({"loss": 0.5}, 1)
    assert caplog.text.count("cannot be written") == 1


# --- a real server ----------------------------------------------------------------------------------------------------


class Server:
    """`mlflow server` on a free port with a copy of a database; can be killed and started again."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder = folder
        shutil.copy(database, folder / "mlflow.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        wait_until(self._healthy, 90)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), database)
    yield server
    server.kill()


@pytest.mark.slow
def test_a_run_is_sent_to_the_server_of_the_environment(
    server: Server,
    run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with Tracker.start(**changed(run, params={"long": "x" * 7000})) as tracker:
        tracker.log_metrics({"loss": math.nan, "other": 1.0}, 0)
        tracker.log_metrics({"loss": math.inf}, 1)
        tracker.finish("FINISHED", patience=60)
    tracked = only_run(server.uri, experiment_of(run))
    assert tracked.info.status == "FINISHED"
    assert len(tracked.data.params["long"]) == journal.MAX_PARAM_LENGTH
    (_, first), (_, second) = history(server.uri, tracked.info.run_id, "loss")
    assert math.isnan(first) and second > 1e308
    assert "x" * 7000 in artifact(server.uri, tracked.info.run_id, "params_full.json", tmp_path)
    assert capfd.readouterr().out == "", "MLflow prints no link to the run"


# --- the environment --------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_environment_holds_commit_lock_packages_and_machine(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/code.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("1")
    (tmp_path / "requirements.lock").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = provenance.environment(device="cpu", threads=2, root=tmp_path)
    assert clean["git.commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert clean["git.dirty"] == "false"
    assert provenance.dirty_patch(tmp_path) == ""
    assert clean["lock.sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (clean["device"], clean["threads"]) == ("cpu", "2")
    assert clean["python"] == ".".join(map(str, sys.version_info[:3]))

    (tmp_path / "src/code.py").write_text("x = 2\n")
    (tmp_path / "src/new.py").write_bytes(b"y = '\xc3\xa4'\r\n")
    (tmp_path / "src/large.py").write_bytes(bytes(provenance.PATCH_FILE_BYTES + 1))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/data.yaml").write_text("archive: https://me:hunter2@host/x?sig=hunter2\n")
    for secret in (".env", "src/.env", "conf/my_token.yaml", "server.key", "src/password.yml", "notes.txt"):
        (tmp_path / secret).write_text("hunter2")
    assert provenance.environment(root=tmp_path)["git.dirty"] == "true"
    patch = provenance.dirty_patch(tmp_path)
    assert "# left out: src/large.py\n" in patch
    assert "hunter2" not in patch and ".env" not in patch
    assert "A " not in git(tmp_path, "status", "--porcelain")  # the index is as it was
    worktree = tmp_path / "worktree"
    git(tmp_path, "worktree", "add", "-q", str(worktree), "HEAD")
    (tmp_path / "dirty.patch").write_text(patch)
    git(worktree, "apply", str(tmp_path / "dirty.patch"))
    assert (worktree / "src/code.py").read_text() == "x = 2\n"
    assert (worktree / "src/new.py").read_bytes() == b"y = '\xc3\xa4'\r\n"


def test_the_environment_needs_neither_git_nor_torch(tmp_path: Path) -> None:
    process = child(
        """
        import sys
        from pathlib import Path
        from src.tracking.provenance import dirty_patch, environment

        values = environment(root=Path.cwd())
        assert (values["git.commit"], values["git.dirty"], values["lock.sha256"]) == ("unknown",) * 3, values
        assert dirty_patch(Path.cwd()) == ""
        assert values["torch"][0].isdigit() and "torch" not in sys.modules
        """,
        cwd=tmp_path,
    )
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


# --- what was deleted or moved, and what the pages show -------------------------------------------------------------


@pytest.mark.parametrize("deleted", ["run", "experiment"])
def test_what_was_deleted_in_mlflow_is_restored_when_the_run_goes_on(
    deleted: str, store: str, run: dict[str, Any]
) -> None:
    from mlflow import MlflowClient

    with pytest.raises(KeyboardInterrupt), Tracker.start(**run, store=store):
        raise KeyboardInterrupt
    send_unsent(run["journal"].parent, store)
    tracked, client = only_run(store, experiment_of(run)), MlflowClient(store)
    if deleted == "run":
        client.delete_run(tracked.info.run_id)
    else:
        client.delete_experiment(tracked.info.experiment_id)
    with Tracker.resume(**run, store=store, sender=False) as tracker:
        tracker.log_metrics({"loss": 0.5}, 1)
    report = send_unsent(run["journal"].parent, store)
    assert report.unsent == 0
    assert any("deleted in MLflow: restored" in problem for problem in report.problems)
    assert history(store, only_run(store, experiment_of(run)).info.run_id, "loss") == [(1, 0.5)]


def test_a_store_that_was_moved_finds_and_writes_its_artifacts_there(run: dict[str, Any], tmp_path: Path) -> None:
    old, new = tmp_path / "old #1", tmp_path / "new 50%20"
    for folder in (old, new):
        if folder == new:
            old.rename(new)
        address = sqlite_address(folder / "experiments" / "mlflow.db")
        tracking_store.connect(address)
        with Tracker.start(**run, store=address) as tracker:
            tracker.log_text("kept", "note.txt")
    runs = tracked_runs(address, experiment_of(run))
    assert [artifact(address, tracked.info.run_id, "note.txt", tmp_path) for tracked in runs] == ["kept", "kept"]
    assert not old.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {new.name, "note.txt"}  # no folder of an escaped name


def test_a_stage_s_journal_is_removed_however_the_stage_ended(store: str, run: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wrong"), Tracker.join(**run, model_sha256="a" * 64, store=store):
        raise ValueError("wrong")
    assert not run["journal"].parent.exists()


def test_a_run_that_is_not_tracked_writes_nothing(run: dict[str, Any]) -> None:
    with Tracker.resume(**changed(run, is_tracked=False)) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
        tracker.sample_system(0.01)
    assert not run["journal"].parent.exists()


def test_data_sets_system_metrics_and_the_onnx_model_are_on_the_run_s_page(
    store: str, run: dict[str, Any], tmp_path: Path
) -> None:
    import numpy as np
    import onnx
    from mlflow import MlflowClient
    from onnx import TensorProto, helper

    shape: tuple[str | int, ...] = ("batch", 2)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    onnx.save(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    dataset = {"name": "digits", "digest": "0a1b", "source_type": "local", "source": "{}", "profile": '{"num_rows": 3}'}
    with Tracker.start(**run, store=store, sender=False) as tracker:
        tracker.sample_system(0.01)
        tracker.log_datasets([dataset | {"context": "train"}])
        tracker.log_model(tmp_path / "m.onnx", "relu", {"x": np.array([[-1, 2]], np.float32)})
        wait_until(lambda: b"system/cpu" in run["journal"].read_bytes())
    assert send_unsent(run["journal"].parent, store).problems == ()
    tracked = only_run(store, experiment_of(run))
    (use,) = tracked.inputs.dataset_inputs
    assert (use.dataset.name, use.dataset.digest, use.tags[0].value) == ("digits", "0a1b", "train")
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= tracked.data.metrics.keys()
    (output,) = tracked.outputs.model_outputs
    logged = MlflowClient(store).get_logged_model(output.model_id)
    assert (logged.name, logged.status.name, logged.source_run_id) == ("relu", "READY", tracked.info.run_id)
    description = (Path(unquote(urlsplit(logged.artifact_location).path)) / "MLmodel").read_text()
    assert "python_function" in description and "saved_input_example_info" in description
    assert '"shape": [-1, 2]' in " ".join(description.split())


# --- how far a journal was sent ---------------------------------------------------------------------------------------


class Client:
    """A client of MLflow that notes what it gets, and whose connection is lost at the calls of these numbers."""

    def __init__(self, lost_at: set[int]) -> None:
        self.lost_at = lost_at
        self.calls = 0
        self.received: list[tuple[str, Any]] = []

    def _call(self, what: str, content: Any) -> None:
        self.calls += 1
        if self.calls in self.lost_at:
            raise ConnectionError("lost")
        self.received.append((what, content))

    def log_batch(self, run_id: str, **entities: Any) -> None:
        ((kind, items),) = entities.items()
        self._call(kind, [(item.key, item.value) for item in items])

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self._call("text", (name, text))

    def set_terminated(self, run_id: str, status: str, ended: int) -> None:
        self._call("status", status)

    def search_runs(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def create_run(self, *_: Any) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="the-run"))

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id, lifecycle_stage="active"))


RECORDS: list[dict[str, Any]] = [
    {"params": {"lr": "0.1"}},
    {"metrics": {"loss": 1.0}, "time": 1, "step": 0},
    {"metrics": {"loss": 0.5, "accuracy": 0.25}, "time": 2, "step": 1},
    {"tags": {"kind": "test"}},
    {"metrics": {"loss": 0.25}, "time": 3, "step": 2},
    {"text": "seed: 0", "name": "config.yaml"},
    {"metrics": {"loss": 0.125}, "time": 4, "step": 3},
]


@pytest.mark.parametrize("lost_at", [set(), {1}, {2}, {3}, {4}, {5}, {6}, {7}, {2, 4, 5, 9}])
def test_a_sending_that_fails_between_two_records_goes_on_with_the_next(
    lost_at: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is missing, nothing is sent twice; the journal is removed when all of a finished run was sent."""
    client, path = Client(lost_at), tmp_path / "tracking.jsonl"
    monkeypatch.setattr(sender, "connect", lambda store: client)
    monkeypatch.setattr(sender, "close_dead_runs", lambda client: None)
    monkeypatch.setattr(sender, "experiment_id", lambda *_: "1")
    journal.create(path, {"experiment": "e", "joins": None, "tags": {}, "process": {}, "name": "n"})

    def write(*records: dict[str, Any]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        for record in records:
            journal.append(descriptor, record)
        os.close(descriptor)

    def send() -> None:
        for _ in range(len(lost_at) + 1):
            sender.JournalSender(path, "a store").send()

    write(*RECORDS)
    send()
    assert path.exists()
    assert journal.count_unsent(path) == 0
    write({"status": "FINISHED", "time": 5})
    send()
    assert not path.exists()
    assert client.received == [
        ("params", [("lr", "0.1")]),
        ("metrics", [("loss", 1.0), ("loss", 0.5), ("accuracy", 0.25)]),
        ("tags", [("kind", "test")]),
        ("metrics", [("loss", 0.25)]),
        ("text", ("config.yaml", "seed: 0")),
        ("metrics", [("loss", 0.125)]),
        ("status", "FINISHED"),
    ]


def test_a_torn_line_is_neither_sent_nor_counted(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    journal.create(path, {"experiment": "e"})
    with path.open("a") as file:
        file.write('{"tags": {"a": "1"}}\n{"tags": {"b"')
    assert [record for _, record in journal.records(path, 0)] == [{"tags": {"a": "1"}}]
    assert journal.count_unsent(path) == 1
    journal.cut_torn_line(path)
    with path.open("a") as file:
        file.write('{"tags": {"c": "3"}}\n')
    assert [record for _, record in journal.records(path, 0)] == [{"tags": {"a": "1"}}, {"tags": {"c": "3"}}]
