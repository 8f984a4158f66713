"""Starts sweep processes on a Ray cluster; they share the study through its storage and need nothing else of Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from src.common.errors import Failure
from src.common.paths import ROOT
from src.common.ray_cluster import connect
from src.sweeping import space

# With the Ray task that started it (its driver, or the cluster, has ended) a sweep process gets SIGTERM, and saves.
END_WITH_TASK = ("setpriv", "--pdeathsig", "TERM")
STORE = "MLFLOW_TRACKING_URI"


def run(config: space.Ray, overrides: Sequence[str]) -> None:
    """Runs `python -m src.sweep` on the cluster, `config.processes` times, and waits for them.

    Their output appears here, prefixed by Ray. Ray restarts a process whose node is lost on another node. If this
    command is stopped, they save and exit.

    Raises:
        Failure: Ray is not installed, there is no cluster, or a process failed.
        SystemExit: a signal stopped it; 143 or 130.
    """
    ray = connect("sweep.ray", {STORE: os.environ[STORE]} if STORE in os.environ else {})
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
