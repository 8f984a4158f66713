"""Training survives MLflow's failures: a server that is down, killed, slow or silent, and a read-only store."""

from __future__ import annotations

import contextlib
import os
import re
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from src.tracking.liveness import FAILURE_TAG
from src.tracking.store import QUIET_AND_BOUNDED
from src.tracking.tracker import PATIENCE_S
from tests.conftest import commands_environment
from tests.fork_server import start_command
from tests.processes import wait_for
from tests.test_runs import SMALL
from tests.test_tracking import Server, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 60  # long enough for the sender to report the failure meanwhile
WORDS = ("+experiment=cifar10_resnet", *SMALL, f"trainer.max_epochs={EPOCHS}")
UNREACHABLE = "MLflow cannot be reached ("
UNSENT = "records of this run are not in MLflow yet ("


@pytest.fixture(scope="module")
def repository(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of its own with prepared data: no other test leaves unsent journals in it."""
    folder = tmp_path_factory.mktemp("mlflow") / "repository"
    subprocess.run(["git", "clone", "--quiet", str(clone), str(folder)], check=True)
    command(folder, "src.train", *WORDS[:-1], "debug=fast")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Sets the variables with which the project imports MLflow."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET_AND_BOUNDED.items():
            patch.setenv(name, value)
        yield


def start(repository: Path, *words: str, store: str = "") -> subprocess.Popen[str]:
    environment = commands_environment() | ({"MLFLOW_TRACKING_URI": store} if store else {})
    return start_command(("python", "-m", *words), repository, environment)


def command(repository: Path, *words: str, store: str = "") -> str:
    """The output of a command that must succeed."""
    process = start(repository, *words, store=store)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def empty_store(folder: Path) -> Path:
    """An MLflow database without runs."""
    from src.tracking.store import connect

    folder.mkdir(parents=True, exist_ok=True)
    connect(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder, empty_store(folder / "empty"))
    yield server
    server.kill()


class Proxy:
    """Passes connections on to `port` of this machine; each piece of a request waits `delay` seconds first."""

    def __init__(self, port: int, delay: float) -> None:
        closing = self.closing = threading.Event()

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                import socket

                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as behind:
                    answers = threading.Thread(target=pump, args=(behind, self.request, 0), daemon=True)
                    answers.start()
                    pump(self.request, behind, delay)

        def pump(source: Any, target: Any, delay: float) -> None:
            with contextlib.suppress(OSError):
                while (piece := source.recv(65536)) and not closing.wait(delay):
                    target.sendall(piece)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Timed:
    """The output of a training and its durations: training alone and the complete command, in seconds."""

    output: str
    training: float
    seconds: float


def timed(repository: Path, *words: str, store: str, meanwhile: Callable[[], None] | None = None) -> Timed:
    """A training that must end with code 0; `meanwhile` is called after its second epoch."""
    start_time = time.monotonic()
    process = start(repository, "src.train", *WORDS, *words, store=store)
    if meanwhile:
        wait_for(process, r"^epoch 2/")
        meanwhile()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    match = re.search(r"^trained in ([\d.]+) s", output, re.MULTILINE)
    assert match, output
    return Timed(output, float(match[1]), time.monotonic() - start_time)


class Normal:
    """The duration of the training with a working server."""

    def __init__(self, repository: Path, server: Server) -> None:
        self.repository, self.server, self.count = repository, server, 0
        self.slowest = self.measure()

    def measure(self) -> Timed:
        self.server.start()
        self.count += 1
        return timed(self.repository, f"seed={100 + self.count}", store=self.server.uri)

    def assert_within(self, training: Timed, patience: float, record: Callable[[str, object], None]) -> None:
        """Asserts at most 10 % and 3 s more than normal, and for the complete command `patience` seconds beyond that.

        On a shared machine the load may have changed: a failed comparison measures the normal training again.
        """
        if not self._within(training, patience):
            repeated = self.measure()
            self.slowest = max(self.slowest, repeated, key=lambda timed: timed.seconds)
        record("seconds, training and command", (training.training, training.seconds))
        record("normal", (self.slowest.training, self.slowest.seconds))
        print(f"\n{training.training:.1f} of {training.seconds:.1f} s training; normally", end=" ")
        print(f"{self.slowest.training:.1f} of {self.slowest.seconds:.1f} s")
        assert self._within(training, patience)

    def _within(self, training: Timed, patience: float) -> bool:
        return (
            training.training <= 1.1 * self.slowest.training + 3
            and training.seconds <= 1.1 * self.slowest.seconds + 3 + patience
        )


@pytest.fixture(scope="module")
def normal(repository: Path, server: Server) -> Normal:
    return Normal(repository, server)


def recorded(store: str, seed: int) -> Any:
    """The run with this seed, or None."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("cifar10_resnet")
    runs = client.search_runs([experiment.experiment_id], f"params.seed = '{seed}'") if experiment else []
    assert len(runs) <= 1
    return runs[0] if runs else None


def assert_complete(store: str, seed: int, epochs: int = EPOCHS) -> None:
    from mlflow import MlflowClient

    run = recorded(store, seed)
    assert run.info.status == "FINISHED"
    points = MlflowClient(store).get_metric_history(run.info.run_id, "val_accuracy")
    assert sorted(point.step for point in points) == list(range(1, epochs + 1))
    assert {"train_seconds", "train_loss"} <= run.data.metrics.keys()
    artifacts = {artifact.path for artifact in MlflowClient(store).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "history.csv"} <= artifacts


def sync(repository: Path) -> None:
    output = command(repository, "src.sync")
    assert re.search(r"^[1-9]\d* records sent, 0 still unsent$", output, re.MULTILINE), output
    assert not list(repository.glob("experiments/.work/*/*.jsonl"))


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_absent_server_delays_no_training_and_sync_sends_the_run(
    normal: Normal, repository: Path, server: Server, record_property: Callable[[str, object], None]
) -> None:
    server.kill()
    training = timed(repository, "seed=61", store=server.uri)
    assert training.output.count(UNREACHABLE) == 1
    assert training.output.count(UNSENT) == 1 and "python -m src.sync" in training.output
    normal.assert_within(training, 0, record_property)
    server.start()
    sync(repository)
    assert_complete(server.uri, 61)


@pytest.mark.long
def test_a_killed_server_delays_no_training_and_sync_sends_the_remainder(
    normal: Normal, repository: Path, server: Server, record_property: Callable[[str, object], None]
) -> None:
    server.start()

    def kill() -> None:
        wait_until(lambda: recorded(server.uri, 62) is not None, 60)
        server.kill()

    training = timed(repository, "seed=62", store=server.uri, meanwhile=kill)
    assert training.output.count(UNREACHABLE) == 1  # during the training
    assert training.output.count(UNSENT) == 1
    normal.assert_within(training, 0, record_property)
    server.start()
    assert recorded(server.uri, 62).info.status == "RUNNING"
    sync(repository)
    assert_complete(server.uri, 62)


@pytest.mark.long
@pytest.mark.parametrize(("delay", "seed"), [(1.0, 63), (600.0, 64)], ids=["slow", "silent"])
def test_a_slow_server_delays_the_end_by_the_patience_at_most(
    delay: float,
    seed: int,
    normal: Normal,
    repository: Path,
    server: Server,
    record_property: Callable[[str, object], None],
) -> None:
    server.start()
    proxy = Proxy(server.port, delay)
    try:
        training = timed(repository, f"seed={seed}", store=proxy.uri)
    finally:
        proxy.close()
    normal.assert_within(training, PATIENCE_S, record_property)
    if UNSENT in training.output:
        command(repository, "src.sync", store=server.uri)
    assert_complete(server.uri, seed)


# --- a database -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_read_only_store_delays_no_training_and_sync_sends_the_run(
    normal: Normal, repository: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    database = empty_store(tmp_path / "store")
    store = f"sqlite:///{database}"
    version = write_version(database, b"\x03")
    training = timed(repository, "seed=65", store=store)
    assert training.output.count(UNREACHABLE) == 1 and "readonly database" in training.output
    assert training.output.count(UNSENT) == 1
    normal.assert_within(training, 0, record_property)
    write_version(database, version)
    sync(repository)
    assert_complete(store, 65)


def write_version(database: Path, version: bytes) -> bytes:
    """Sets the write version in SQLite's header (above 2: read-only); returns the previous one.

    Permissions do not stop root.
    """
    with database.open("r+b") as file:
        file.seek(18)
        old = file.read(1)
        file.seek(18)
        file.write(version)
    return old


@pytest.mark.long
def test_six_simultaneous_trainings_create_and_share_a_store(repository: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/new/mlflow.db"
    words = ("src.train", *WORDS, "trainer.max_epochs=1")
    processes = [start(repository, *words, f"seed={seed}", store=store) for seed in range(70, 76)]
    for process in processes:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        assert "Traceback" not in output
    command(repository, "src.sync")  # with two cores, the patience of one may end first
    for seed in range(70, 76):
        assert_complete(store, seed, epochs=1)
    assert sorted(os.listdir(tmp_path / "new")) == ["mlflow", "mlflow.db", "mlflow.db.lock"]
    assert not (repository / "mlruns").exists()


def test_the_next_run_closes_a_killed_one_and_leaves_a_live_one_open(repository: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{empty_store(tmp_path / 'store')}"

    def status(seed: int) -> str:
        run = recorded(store, seed)
        return run.info.status if run else "missing"

    def started(seed: int) -> subprocess.Popen[str]:
        words = ("src.train", *WORDS, "trainer.max_epochs=5000", f"seed={seed}")
        process = start(repository, *words, store=store)
        threading.Thread(target=process.communicate, daemon=True).start()  # empties its pipe
        wait_until(lambda: status(seed) == "RUNNING", 90)
        return process

    dead, alive = started(81), None
    try:
        alive = started(82)
        assert status(81) == "RUNNING"
        dead.kill()
        dead.wait()
        command(repository, "src.train", *WORDS, "trainer.max_epochs=1", "seed=83", store=store)
        assert (status(81), status(82), status(83)) == ("KILLED", "RUNNING", "FINISHED")
        assert "ended without a word" in recorded(store, 81).data.tags[FAILURE_TAG]
        assert alive.poll() is None
    finally:
        for process in (dead, alive):
            if process is not None:
                process.kill()
                process.wait()
