"""Starts sweep processes on a Ray cluster; they share the study through its storage and need nothing else of Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from urllib.parse import urlsplit

from src.common.errors import Failure
from src.common.paths import ROOT
from src.sweeping import space

# With the Ray task that started it (its driver, or the cluster, has ended) a sweep process gets SIGTERM, and saves.
END_WITH_TASK = ("setpriv", "--pdeathsig", "TERM")
SETTINGS = {"RAY_DEDUP_LOGS": "0"}  # lines of different trials are not repetitions
STORE = "MLFLOW_TRACKING_URI"
CONNECT_TIMEOUT_S = 10.0


def run(config: space.Ray, overrides: Sequence[str]) -> None:
    """Runs `python -m src.sweep` on the cluster, `config.processes` times, and waits for them.

    Their output appears here, prefixed by Ray. Ray restarts a process whose node is lost on another node. If this
    command is stopped, they save and exit.

    Raises:
        Failure: Ray is not installed, there is no cluster, or a process failed.
        SystemExit: a signal stopped it; 143 or 130.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        remedy = "pip install ray (the extra `cluster` of pyproject.toml)"
        raise Failure(f"sweep.ray needs Ray, which is not installed: {remedy}") from None
    address = os.environ.get("RAY_ADDRESS", "auto")
    variables = {STORE: os.environ[STORE]} if STORE in os.environ else {}
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        if parts.hostname and parts.port:  # Ray itself would try for minutes
            socket.create_connection((parts.hostname, parts.port), CONNECT_TIMEOUT_S).close()
        ray.init(address=address, runtime_env={"env_vars": variables}, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise Failure(f"sweep.ray: no Ray cluster at RAY_ADDRESS={address}: {message}") from None
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt  # the only exception that `ray.get` lets through a signal handler

    for number in (signal.SIGTERM, signal.SIGINT):  # Ray's own handlers exit with other codes
        signal.signal(number, stop)
    try:
        command = [*END_WITH_TASK, sys.executable, "-m", "src.sweep", *overrides, "sweep.ray=null"]
        start = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_retries=-1)(subprocess.run)
        tasks = [start.remote(command, cwd=ROOT) for _ in range(config.processes)]
        codes = [process.returncode for process in ray.get(tasks)]
    except KeyboardInterrupt:
        raise SystemExit(128 + signals[0]) from None
    except ray.exceptions.RayError as error:
        message = str(error).strip().splitlines()[-1][:200]
        raise Failure(f"sweep.ray: a node can't run the sweep ({message}); it needs {ROOT} and setpriv") from None
    finally:
        ray.shutdown()
    if failures := [str(code) for code in codes if code]:
        raise Failure(
            f"{len(failures)} of {len(codes)} sweep processes failed (exit codes {', '.join(failures)}; see above); "
            "the same command goes on"
        )
