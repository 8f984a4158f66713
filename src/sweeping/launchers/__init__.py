"""Where a sweep's workers come from: processes of this machine, tasks of a Ray cluster, jobs of SLURM.

One protocol, and one loop, for all of them. A worker may be long in coming: it waits in a cluster's queue.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from src.common.errors import Failure
from src.common.hardware import cores
from src.sweeping.space import SweepConfig
from src.sweeping.worker import Worker


class Launcher(Protocol):
    """Starts workers."""

    threads: int | None  # of a trial whose configuration does not say; None: torch's own choice

    @property
    def pending(self) -> int:
        """How many workers were asked for and are not there yet."""

    @property
    def watched(self) -> list[Any]:
        """What becomes ready when one arrives."""

    def request(self) -> None:
        """Asks for one more worker; returns at once.

        Raises:
            Failure: it can't be asked for.
        """

    def arrived(self) -> list[Worker]:
        """The workers that are there now and were not when this was called last.

        Raises:
            Failure: several in a row did not start; why, and where the log is.
        """

    def close(self) -> None:
        """Gives up what is still pending; the workers end once their connections are closed."""


class Local:
    """Workers that are processes of this machine, and share its cores."""

    def __init__(self, config: SweepConfig) -> None:
        self._accelerator = config.trainer.accelerator
        self._fresh: list[Worker] = []
        processes = config.sweep.workers * config.trainer.devices
        self.threads = max(1, cores() // processes) if config.sweep.workers > 1 else None
        self.watched: list[Any] = []

    @property
    def pending(self) -> int:
        return len(self._fresh)

    def request(self) -> None:
        self._fresh.append(Worker(self._accelerator))

    def arrived(self) -> list[Worker]:
        fresh, self._fresh = self._fresh, []
        return fresh

    def close(self) -> None:
        """Nothing is pending."""


def launcher(config: SweepConfig, folder: Path) -> Launcher:
    """The launcher that the configuration asks for; `folder`: what cluster and sweep exchange, seen by both.

    Raises:
        Failure: what it needs is not installed, or there is no such cluster.
    """
    match config.sweep.launcher:
        case "ray":
            from src.sweeping.launchers import home, on_ray

            return home.Home(on_ray.Tasks(config), config, folder)
        case "submitit":
            from src.sweeping.launchers import home, on_slurm

            return home.Home(on_slurm.Jobs(config, folder), config, folder)
    return Local(config)


def imported(name: str) -> ModuleType:
    """A package that only clusters need.

    Raises:
        Failure: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        remedy = f"pip install {name} (the extra `cluster` of pyproject.toml)"
        raise Failure(f"sweep.launcher needs {name}, which is not installed: {remedy}") from None
