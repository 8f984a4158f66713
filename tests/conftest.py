"""Shared fixtures: a clean clone to run the commands in, a PostgreSQL server, an S3 endpoint."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import start_command
from tests.s3 import S3
from tests.servers import PostgreSQL

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (
    "test_sweep.py",
    "test_runs.py",
    "test_reproduce.py",
    "faults/test_processes.py",
    "faults/test_saving.py",
)  # several minutes each

Run = Callable[..., subprocess.CompletedProcess[str]]


def commands_environment() -> dict[str, str]:
    """The environment of a user who has activated .venv; the MLflow store is the clone's."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_", "PYTEST_"))}
    return inherited | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first, so that parallel workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    longest = {ROOT / "tests" / name for name in LONGEST}
    items.sort(key=lambda item: (item.path not in longest, item.path not in slow))


@pytest.fixture
def restore_deterministic_mode() -> Iterator[None]:
    """Restores the process-wide setting that a Trainer changes."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def restore_subnormal_numbers() -> Iterator[None]:
    """Training in this process makes the CPU flush subnormal numbers to zero; hypothesis needs them."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone of this repository, uncommitted changes included."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    diff = subprocess.run(["git", "diff", "HEAD", "--binary"], cwd=ROOT, capture_output=True, check=True).stdout
    if diff.strip():
        subprocess.run(["git", "apply"], cwd=folder, input=diff, check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-am", "as tested"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def run(clone: Path) -> Run:
    """Runs a command in the clone, as a user would."""
    return functools.partial(run_in, clone)


def run_in(
    folder: Path, *words: str, timeout: float = 300, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a repository, with further environment variables."""
    with start_command(words, folder, commands_environment() | environment, stderr=subprocess.PIPE) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    assert not check or process.returncode == 0, f"{' '.join(words)}\n{stdout[-4000:]}\n{stderr[-4000:]}"
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


@contextlib.contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    """Replaces the first `old` in a file of the clone, for a while."""
    original = path.read_text()
    assert old in original
    path.write_text(original.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_text(original)


@pytest.fixture
def fast_heartbeats(clone: Path) -> Iterator[None]:
    """In the clone, a sweep process counts as dead after 10 s instead of 5 min without a heartbeat."""
    with edited(clone / "src" / "sweeping" / "storage.py", "HEARTBEAT_S = 60", "HEARTBEAT_S = 2"):
        yield


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """A PostgreSQL server that a test may stop and restart."""
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def postgresql(postgresql_server: PostgreSQL) -> str:
    """The postgresql:// URL, with a password, of an empty database."""
    return postgresql_server.empty()


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes of one CPU each, at RAY_ADDRESS."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 endpoint without buckets."""
    with S3() as server:
        yield server
