"""Workers as tasks of a Ray cluster that is there already."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import Any
from urllib.parse import urlsplit

from src.common.errors import Failure
from src.common.paths import ROOT
from src.sweeping.launchers import imported
from src.sweeping.launchers.home import last_line, outward
from src.sweeping.space import SweepConfig

# Ray phones home, and writes what its own processes do into the terminal.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_LOG_TO_STDERR": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
REACHED_WITHIN_S = 10.0


class Tasks:
    """A connection to a Ray cluster. A task does nothing but run a command: Ray uploads no code and imports none."""

    def __init__(self, config: SweepConfig) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self._ray: Any = imported("ray")
        address, wanted = config.sweep.address, config.sweep.resources
        ours = signal.getsignal(signal.SIGTERM)
        found = urlsplit(address if "//" in address else f"//{address}")
        try:
            if found.hostname and found.port:  # Ray itself would try for minutes
                socket.create_connection((found.hostname, found.port), REACHED_WITHIN_S).close()
            self._ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
        except (OSError, ImportError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise Failure(f"sweep.address={address}: no Ray cluster can be reached there: {said}") from None
        finally:
            signal.signal(signal.SIGTERM, ours)  # Ray puts its own in place
        # A client of Ray is no part of its cluster.
        self.host = outward(str(found.hostname)) if found.scheme else self._ray.util.get_node_ip_address()
        memory = {"memory": int(wanted.memory_gb * 2**30)} if wanted.memory_gb else {}
        asked = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, **memory}
        self._say_if_nowhere({"CPU": wanted.cpus, "GPU": wanted.gpus, **memory})
        # What died is started anew by the sweep, which knows of it at once.
        self._run = self._ray.remote(**asked, max_retries=0)(subprocess.run)

    def start(self, command: list[str]) -> Any:
        return self._run.remote(command, cwd=str(ROOT), capture_output=True, text=True)

    def ended(self, job: Any) -> str | None:
        if not self._ray.wait([job], timeout=0)[0]:
            return None
        try:
            done: subprocess.CompletedProcess[str] = self._ray.get(job)
        except Exception as error:  # Ray's, and whatever the task raised
            return last_line(str(error)) or type(error).__name__
        return last_line(done.stderr) or f"exit code {done.returncode}"

    def cancel(self, job: Any) -> None:
        self._ray.cancel(job, force=True)

    def close(self) -> None:
        self._ray.shutdown()

    def _say_if_nowhere(self, wanted: dict[str, float]) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(key, 0) >= amount for key, amount in wanted.items()) for node in nodes):
            asked = ", ".join(f"{key} {amount:g}" for key, amount in wanted.items())
            print(f"no node of the Ray cluster has {asked} yet (sweep.resources): the sweep waits for one", flush=True)
