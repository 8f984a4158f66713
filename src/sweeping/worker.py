"""A worker: a process that trains one trial after the other, with imports and data that stay warm.

Only the sweep's own process knows Optuna; a worker gets a checked configuration and tells what came of it, through a
pipe. So a worker may die in any way: the study does not.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from src.common.errors import Failure, Lost
from src.common.paths import ROOT
from src.configuration.composing import check

LOG = "log.txt"


@dataclass(frozen=True)
class Job:
    """A trial to be trained."""

    number: int
    study: str
    config: Mapping[str, Any]
    objectives: tuple[str, ...]
    prunes: bool  # whether each validation waits for an answer
    parent: str  # the identity of the sweep's journal
    work: Path  # where checkpoints and journal lie


@dataclass(frozen=True)
class Validated:
    """What the first objective's metric is after so many epochs."""

    epoch: int
    value: float


@dataclass(frozen=True)
class Ended:
    """A trial came to its end, or was pruned."""

    values: tuple[float, ...]
    pruned: bool
    seconds: float  # of training


@dataclass(frozen=True)
class Failed:
    """A trial failed; one line says why."""

    reason: str


@dataclass(frozen=True)
class Interrupted:
    """A signal ended the worker; what the trial reached is saved."""


Message = Validated | Ended | Failed | Interrupted


def warm_up(accelerator: str) -> None:
    """Begins the imports of all workers, in the server that they are forked from; returns at once."""
    if accelerator == "cpu":
        forkserver.set_forkserver_preload(["src.sweeping.warm"])
        forkserver.ensure_running()


class Worker:
    """A worker process, as the sweep sees it."""

    def __init__(self, accelerator: str) -> None:
        # Forked from a process that has imported everything and computed nothing; CUDA does not survive even that.
        context: Any = multiprocessing.get_context("forkserver" if accelerator == "cpu" else "spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), name="sweep-worker", daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def train(self, job: Job) -> None:
        """Hands it a trial."""
        self.job = job
        with contextlib.suppress(OSError):  # it is dead: its sentinel says so
            self.connection.send(job)

    def answer(self, prune: bool) -> None:
        """Whether the trial that has just reported is to end."""
        with contextlib.suppress(OSError):
            self.connection.send(prune)

    def end(self) -> None:
        """Asks it to save and end."""
        if self.process.is_alive():
            self.process.terminate()

    def leave(self) -> None:
        """Lets it end by itself, for a moment, once its connection is closed."""
        self.process.join(0.5)
        self.end()

    @property
    def watched(self) -> list[Any]:
        """What becomes ready when it says something, or dies."""
        return [self.connection, self.process.sentinel]

    @property
    def death(self) -> str:
        """How it died, once it is dead."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}, out of memory?" if name == "SIGKILL" else name


def work(connection: Connection) -> None:
    """The process: trains what comes through the pipe until there is no more, or the sweep's process is gone."""
    os.setsid()  # Ctrl-C reaches the sweep alone, which tells its workers
    threading.Thread(target=_end_with_sweep, name="end-with-sweep", daemon=True).start()
    with contextlib.suppress(ImportError):  # which the first trial tells
        warmed()  # while the first trial is still being thought out
    with contextlib.suppress(EOFError, OSError):
        while True:
            job: Job = connection.recv()
            with _log(ROOT / job.config["output"] / LOG):
                message = _train(job, connection)
            connection.send(message)
            if isinstance(message, Interrupted):
                return


def _end_with_sweep() -> None:
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os._exit(1)


@functools.cache
def warmed() -> ModuleType:
    """What trains a trial, imported once, and then out of the garbage collector's sight, which is asked at each end."""
    from src.common.hardware import keep_freed_memory
    from src.sweeping import trial

    keep_freed_memory()
    gc.collect()
    gc.freeze()
    return trial


def _train(job: Job, connection: Connection) -> Message:
    try:
        trial = warmed()

        def report(epoch: int, value: float) -> bool:
            connection.send(Validated(epoch, value))
            return job.prunes and bool(connection.recv())

        return trial.run(job, check(job.config), report)
    except SystemExit:
        return Interrupted()
    except Lost as error:  # one of its processes was killed: to the sweep as if this one had been
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except Failure as error:
        print(f"failed: {error}", file=sys.stderr)
        return Failed(str(error).splitlines()[0])
    except Exception as error:  # whatever a trial does, the sweep goes on
        traceback.print_exc()
        return Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300])


@contextlib.contextmanager
def _log(path: Path) -> Any:
    """Everything that is written to the terminal goes into a trial's own file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
