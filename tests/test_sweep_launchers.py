"""Workers of a Ray cluster and of SLURM's jobs: they call the sweep, die, are replaced; or can't be started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from src.common.errors import Failure
from src.common.paths import ROOT
from src.configuration.composing import check, compose_unchecked
from src.sweeping.launchers.home import Home
from src.sweeping.space import SweepConfig
from src.sweeping.worker import Worker
from tests.conftest import Run
from tests.processes import wait_for
from tests.test_sweep import CIFAR, folder_of, start, trials_of
from tests.test_sweep_storage import SHORT, SWEEP, finished

LOCAL = ("sweep.launcher=submitit", "sweep.cluster=local")
PROMPT_S = 30.0


class Processes:
    """A cluster of this machine's processes."""

    host = "127.0.0.1"

    def __init__(self, prefix: tuple[str, ...] = ()) -> None:
        self.prefix = prefix
        self.started: list[subprocess.Popen[str]] = []

    def start(self, command: list[str]) -> Any:
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        self.started.append(subprocess.Popen([*self.prefix, *command], **given))  # type: ignore[call-overload]
        return self.started[-1]

    def ended(self, job: subprocess.Popen[str]) -> str | None:
        return None if job.poll() is None else f"exit code {job.returncode}"

    def cancel(self, job: subprocess.Popen[str]) -> None:
        job.kill()

    def close(self) -> None:
        pass


def home(cluster: Processes, folder: Path) -> Home:
    given = [*SHORT, *LOCAL, "output=."]
    config: SweepConfig = check(compose_unchecked(given), SweepConfig)
    return Home(cluster, config, folder)


def arrival(launcher: Home) -> Worker:
    until = time.monotonic() + PROMPT_S
    while time.monotonic() < until:
        if workers := launcher.arrived():
            return workers[0]
        time.sleep(0.05)
    raise AssertionError("nobody called")


def test_a_worker_calls_home_and_ends_when_it_is_hung_up_on(tmp_path: Path) -> None:
    cluster = Processes()
    with contextlib.closing(home(cluster, tmp_path)) as launcher:
        launcher.request()
        assert launcher.pending == 1
        worker = arrival(launcher)
        assert launcher.pending == 0
        worker.connection.close()
        cluster.started[0].wait(PROMPT_S)
        assert not (tmp_path / "worker-0.log").read_text()


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """As a node of a cluster does that is taken away: what it started must not work on."""
    shell = ("sh", "-c", '"$@" & echo $!; wait', "sh")
    cluster = Processes(shell)
    with contextlib.closing(home(cluster, tmp_path)) as launcher:
        launcher.request()
        worker = arrival(launcher)
        (remote,) = psutil.Process(cluster.started[0].pid).children()
        cluster.started[0].kill()
        assert worker.connection.poll(PROMPT_S)
        with pytest.raises(EOFError):
            worker.connection.recv()
        remote.wait(PROMPT_S)


@pytest.mark.long
def test_strangers_at_the_door_neither_get_in_nor_hold_it_up(tmp_path: Path) -> None:
    cluster = Processes()
    with contextlib.closing(home(cluster, tmp_path)) as launcher:
        (door,) = launcher.watched
        address = door.getsockname()
        assert (tmp_path / "home.json").stat().st_mode & 0o777 == 0o600
        with socket.create_connection(address) as silent:
            assert launcher.arrived() == []
            silent.close()
        launcher.request()
        with socket.create_connection(address):  # says nothing, and stays
            arrival(launcher)
    with pytest.raises((AuthenticationError, OSError, EOFError)):
        Client(address, authkey=b"wrong")


def test_workers_that_cannot_start_end_the_sweep_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = home(Processes(("false",)), tmp_path)
    with (
        contextlib.closing(launcher),
        pytest.raises(Failure, match="3 workers in a row did not start, the last: exit code 1"),
    ):
        for _ in range(3):
            launcher.request()
            until = time.monotonic() + PROMPT_S
            while launcher.pending and time.monotonic() < until:
                launcher.arrived()
                time.sleep(0.05)
    assert capfd.readouterr().out.splitlines() == [f"worker {i} did not start: exit code 1" for i in range(3)]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_sweep_whose_workers_are_submitted_jobs(clone: Path) -> None:
    """One of them is killed, and one asked by its cluster to go."""
    words = (*CIFAR, *LOCAL, "sweep.study=jobs", "sweep.trials=5", "sweep.workers=2", "sweep.resources.cpus=2")
    process = start(clone, *(word for word in words if word != "trainer.threads=1"))
    wait_for(process, r"^ +\d+  complete")
    victim, asked = remotes(clone)
    os.kill(victim.pid, signal.SIGKILL)
    os.kill(asked.pid, signal.SIGTERM)
    said = finished(process)
    assert re.search(r"trial \d+: its process died \(the connection to \S+ broke\)", said)
    rows = trials_of(clone, "jobs")
    assert [row["trial"] for row in rows] == list(map(str, range(5)))
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    written = yaml.safe_load((folder_of(clone, "jobs") / "trials" / "0" / "config.yaml").read_text())
    assert written["trainer"]["threads"] == 2
    gone_within(remotes(clone))


def remotes(clone: Path) -> list[psutil.Process]:
    """The workers of sweeps in the clone that were started by a cluster."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        line = each.info["cmdline"] or []
        if "src.sweeping.remote" in line and line[0] == sys.executable and str(clone) in " ".join(line):
            found.append(each)
    return found


def gone_within(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, PROMPT_S)
    assert not alive


@pytest.mark.slow
@pytest.mark.long
def test_a_launcher_that_cannot_be_is_named_in_one_line(clone: Path, run: Run) -> None:
    for words, code, said in (
        (["sweep.launcher=submitit"], 1, 'sweep.cluster=slurm, sweep.slurm: submitit refuses: Could not detect "srun"'),
        ([*LOCAL, "sweep.slurm={partitoin: gpu}"], 1, "Unknown argument 'partitoin' for executor 'slurm'"),
        (["sweep.launcher=ray", "sweep.address=127.0.0.1:1"], 1, "sweep.address=127.0.0.1:1: no Ray cluster"),
        (["sweep.slurm={partition: gpu}"], 2, "sweep.slurm: says nothing to sweep.launcher=local; it is for submitit"),
        ([*LOCAL, "trainer=gpu"], 2, "sweep.resources.gpus: is 0"),
    ):
        done = run(*SWEEP, *SHORT, "sweep.study=refused", *words, check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.fixture
def ray_cluster() -> Iterator[Any]:
    """Two nodes of one CPU each; yields their cluster."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_ray_cluster_that_loses_a_node_ends_the_sweep_complete(clone: Path, ray_cluster: Any) -> None:
    words = (*CIFAR, "sweep.launcher=ray", f"sweep.address={ray_cluster.address}", "sweep.study=ray")
    process = start(clone, *words, "sweep.trials=8", "sweep.workers=2")
    wait_for(process, r"^ +\d+  complete")
    wait_for(process, r"^ +\d+  complete")
    (node,) = ray_cluster.worker_nodes
    family = [
        each for pid in pids_of(node) for each in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid))
    ]
    assert any("src.sweeping.remote" in each.cmdline() for each in family)  # one of the workers is there
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    said = finished(process)
    assert re.search(r"trial \d+: its process died \(the connection to \S+ broke\)", said)
    rows = trials_of(clone, "ray")
    assert [row["trial"] for row in rows] == list(map(str, range(8)))
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    rays = r"\S*\(raylet\)\S* The node with node id|\t"  # that a node is gone is news
    strange = [line for line in said.splitlines() if not re.match(rf"study|trial|best| +\d+ |  python|$|{rays}", line)]
    assert not strange  # nothing else of Ray's own
    gone_within(remotes(clone))


def pids_of(node: Any) -> list[int]:
    return [each.process.pid for kind in node.all_processes.values() for each in kind]
