"""Sweep processes on a real Ray cluster of two nodes: stopped, resumed, and with a node killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Run, commands_environment
from tests.fork_server import start_command
from tests.processes import commands_of, kill_node, wait_for
from tests.test_sweep import CIFAR, SWEEP, folder_of, trials_of

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

RAY = "sweep.ray={processes: 2}"
SHUTDOWN_TIMEOUT_S = 30.0


def start(clone: Path, *words: str) -> subprocess.Popen[str]:
    """Starts a sweep; with -B it is not forked from tests/fork_server.py, after which Ray started no processes."""
    return start_command((sys.executable, "-B", "-m", "src.sweep", *words), clone, commands_environment())


def sweep_processes(clone: Path) -> list[psutil.Process]:
    """The sweep processes that Ray started in the clone."""
    processes = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = process.info["cmdline"] or []
        if "src.sweep" in command and "sweep.ray=null" in command and process.info["cwd"] == str(clone):
            processes.append(process)
    return processes


@pytest.mark.usefixtures("fast_heartbeats")
def test_a_ray_sweep_that_was_stopped_and_then_lost_a_node_is_complete(
    clone: Path, ray_cluster: Any, tmp_path: Path
) -> None:
    storage = f"sweep.storage=journal:{tmp_path}/study.log"
    words = (*CIFAR, RAY, storage, "sweep.study=ray", "sweep.trials=8", "trainer.checkpoint_seconds=0")
    stopped = start(clone, *words)
    wait_for(stopped, r" +\d+  complete")
    assert len(sweep_processes(clone)) == 2
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 143, output
    _, alive = psutil.wait_procs(sweep_processes(clone), SHUTDOWN_TIMEOUT_S)
    assert not alive
    process = start(clone, *words)
    for _ in range(2):
        wait_for(process, r" +\d+  complete")
    (node,) = ray_cluster.worker_nodes
    assert any("src.sweep" in command for command in commands_of(node))
    kill_node(node)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert re.search(r"trial \d+: taken over from a process that died", output)
    rows = trials_of(clone, "ray")
    assert [row["trial"] for row in rows] == list(map(str, range(8)))
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    logs = [(folder_of(clone, "ray") / "trials" / row["trial"] / "log.txt").read_text() for row in rows]
    assert any("goes on with the run that was interrupted" in log for log in logs)  # from its checkpoint


def test_a_cluster_that_is_not_there_is_named_in_one_line(
    clone: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    words = (*CIFAR, RAY, f"sweep.storage=journal:{tmp_path}/study.log", "sweep.study=nowhere")
    done = run(*SWEEP, *words, check=False)
    assert done.returncode == 1
    assert "sweep.ray: no Ray cluster at RAY_ADDRESS=127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
