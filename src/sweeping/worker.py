"""Worker processes: each trains one trial after the other and keeps its imports and data from trial to trial.

Only the sweep's own process uses Optuna. A worker gets a resolved configuration and sends messages back through a pipe,
so it may die in any way without harm to the study.
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
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from src.common.errors import Failure, Lost
from src.common.hardware import keep_freed_memory
from src.common.paths import ROOT
from src.configuration.composing import check
from src.configuration.schema import Trainer
from src.sweeping.messages import Failed, Job, Message, Validated

LOG = "log.txt"
SHUTDOWN_TIMEOUT_S = 0.5


def start_fork_server(accelerator: str) -> None:
    """Starts the process that workers are forked from, which imports the training code; returns at once."""
    if accelerator == "cpu":
        forkserver.set_forkserver_preload(["src.sweeping.preload"])
        forkserver.ensure_running()


class Worker:
    """A worker process, seen from the sweep; `job` is None while it is idle.

    `number` selects its GPU, if a trial trains on one: no two workers have the same number.
    """

    def __init__(self, trainer: Trainer, number: int) -> None:
        self.number = number
        gpu = number if trainer.accelerator != "cpu" and trainer.devices == 1 else None
        # CUDA does not survive a fork, not even of a process that has only imported torch.
        context: Any = multiprocessing.get_context("forkserver" if trainer.accelerator == "cpu" else "spawn")
        self.connection, remote_end = context.Pipe()
        self.process = context.Process(target=serve, args=(remote_end, gpu), name="sweep-worker", daemon=True)
        self.process.start()
        remote_end.close()
        self.job: Job | None = None

    def send(self, message: Job | bool) -> None:
        """Sends a trial, or the answer to `Validated`: whether the trial is pruned."""
        with contextlib.suppress(OSError):  # the worker is dead: its sentinel is ready
            self.connection.send(message)

    def assign(self, job: Job) -> None:
        """Gives a trial to an idle worker."""
        self.job = job
        self.send(job)

    def terminate(self) -> None:
        """Has the worker save a checkpoint and exit."""
        if self.process.is_alive():
            self.process.terminate()

    def shutdown(self) -> None:
        """Waits a moment for the worker to exit (closing its connection told it to), then terminates it."""
        self.process.join(SHUTDOWN_TIMEOUT_S)
        self.terminate()

    @property
    def waitables(self) -> list[Any]:
        """Ready, for `multiprocessing.connection.wait`, when the worker sends a message or exits."""
        return [self.connection, self.process.sentinel]

    def cause_of_death(self) -> str:
        """The signal or exit code of a worker that has exited."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}, out of memory?" if name == "SIGKILL" else name


def serve(connection: Connection, gpu: int | None) -> None:
    """The worker's main function: trains the jobs from `connection` until it is closed or the sweep's process is gone.

    `gpu`: the number of the GPU that it uses, modulo their count; None: trials decide.

    Raises:
        SystemExit: a signal stopped it; a checkpoint is saved.
    """
    os.setsid()  # Ctrl-C reaches the sweep alone, which terminates its workers
    threading.Thread(target=_exit_with_sweep, name="exit-with-sweep", daemon=True).start()
    if gpu is not None:
        use_gpu(gpu)
    with contextlib.suppress(ImportError):  # the first trial reports it
        load_training()  # while the sweep composes the first trial
    with contextlib.suppress(EOFError, OSError):
        while True:
            job: Job = connection.recv()
            with _output_to(ROOT / job.config["output"] / LOG):
                message = _train(job, connection)
            connection.send(message)


def use_gpu(number: int) -> None:
    """Lets this process see one of the GPUs alone, `number` modulo their count; before it uses CUDA."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]


def _exit_with_sweep() -> None:
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os._exit(1)


@functools.cache
def load_training() -> ModuleType:
    """Imports the training code once and freezes it (`gc.freeze`): `gc.collect()` runs after every trial."""
    from src.sweeping import trial

    keep_freed_memory()
    gc.collect()
    gc.freeze()
    return trial


def _train(job: Job, connection: Connection) -> Message:
    def report(epoch: int, value: float) -> bool:
        connection.send(Validated(epoch, value))
        return job.prunes and bool(connection.recv())

    try:
        trial = load_training()
    except Exception as error:
        traceback.print_exc()
        return Failed(_one_line(error))
    try:
        return trial.run(job, check(job.config), report)
    except Lost as error:  # one of a DDP trial's processes was killed: the sweep requeues the trial of a dead worker
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except Failure as error:
        print(f"failed: {error}", file=sys.stderr)
        return Failed(str(error).splitlines()[0], ends_sweep=isinstance(error, trial.MetricNotLogged))
    except Exception as error:  # a trial may raise anything; the sweep goes on
        traceback.print_exc()
        return Failed(_one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Appends stdout and stderr, of native code as well, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), terminal, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
