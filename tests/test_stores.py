"""An MLflow server for a team: rows in PostgreSQL, artifacts in S3, no credentials in the training processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import commands_environment
from tests.s3 import KEYS, S3
from tests.servers import PostgreSQL
from tests.test_runs import SMALL, output_of

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

START_TIMEOUT_S = 120.0  # includes the creation of its tables
BUCKET = "tracking"


@pytest.fixture(scope="module")
def database(postgresql_server: PostgreSQL) -> str:
    return postgresql_server.empty()


@pytest.fixture(scope="module")
def server(database: str, s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server started as in docs/scaling.md."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ("--host", "127.0.0.1", "--port", str(port), "--workers", "2")
    artifacts = ("--artifacts-destination", f"{s3.bucket(BUCKET)}/mlflow")
    stores = KEYS | {"MLFLOW_S3_ENDPOINT_URL": s3.endpoint, "MLFLOW_BACKEND_STORE_URI": with_driver(database)}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["mlflow", "server", *words, *artifacts],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=commands_environment() | stores,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def with_driver(address: str) -> str:
    """The address with its driver: the default of SQLAlchemy 2.1 is psycopg 3."""
    return address.replace("postgresql://", "postgresql+psycopg2://", 1)


def is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_two_simultaneous_trainings_are_tracked_in_postgresql_and_s3(
    server: str, database: str, s3: S3, clone: Path, tmp_path: Path
) -> None:
    import psycopg2
    from mlflow import MlflowClient

    words = ("+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=2")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "src.train", *words, f"seed={seed}"],
            cwd=clone,
            env=commands_environment() | {"MLFLOW_TRACKING_URI": server},  # without the credentials of the stores
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (80, 81)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not [stderr for _, stderr in outputs if "MLflow" in stderr]

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("cifar10_resnet")
    assert experiment
    runs = {run.data.params["seed"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"80", "81"}
    for seed, (stdout, _) in zip(("80", "81"), outputs, strict=True):
        run = runs[seed]
        assert run.info.status == "FINISHED"
        printed = re.findall(r"val_accuracy ([\d.]+)", stdout)
        points = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert [float(f"{point.value:.4g}") for point in points] == [float(value) for value in printed]
        downloaded = Path(client.download_artifacts(run.info.run_id, "history.csv", str(tmp_path)))
        assert downloaded.read_bytes() == (clone / output_of(stdout) / "train" / "history.csv").read_bytes()
        assert any(key.endswith(f"{run.info.run_id}/artifacts/history.csv") for key in s3.keys(BUCKET))
    connection = psycopg2.connect(database)
    with connection, connection.cursor() as cursor:
        cursor.execute("select count(*) from runs where status = 'FINISHED'")
        assert cursor.fetchone() == (2,)
        cursor.execute("select count(*) from metrics where key = 'val_accuracy'")
        assert cursor.fetchone() == (4,)
    connection.close()
