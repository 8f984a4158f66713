"""The processes that train one model together: how they come together, and what becomes of them.

The first one leads: it prepares, reports and writes. The others follow (src.training.follower): they hear from the
first one what to train, and say nothing. torchrun or srun has started them all, or else the first one starts the rest.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment  # type: ignore[attr-defined]  # not in __all__
from pytorch_lightning.strategies import DDPStrategy
from torch import distributed

from src.common.errors import Failure, Lost
from src.common.paths import ROOT
from src.configuration.schema import Trainer
from src.training.launcher import PATIENCE_S, Launch, launch

HOST = "127.0.0.1"
# The others wait as long for the first one to prepare the data; whoever dies is noticed by its closed connections.
PREPARATION = timedelta(hours=2)
POLL_S = 0.5

Value = TypeVar("Value")


def meeting_point(port: int, world: int, *, first: bool = False) -> Any:
    """The store, of torch's, through which processes of this machine find each other; the first one makes it."""
    return distributed.TCPStore(HOST, port, world, is_master=first, wait_for_workers=False)  # type: ignore[attr-defined]


def join(rank: int, world: int, *, store: Any = None, rendezvous: str | None = None) -> None:
    """Makes this process one of a group: tensors of the CPU go through gloo, those of GPUs through NCCL."""
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        rank=rank,
        world_size=world,
        store=store,
        init_method=rendezvous,
        timeout=PREPARATION,
    )


def broadcast(value: Value) -> Value:
    """The first process's value, in all processes of the run."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def dismiss() -> None:
    """Tells those who follow that there is nothing more to train."""
    broadcast(None)


@contextlib.contextmanager
def joined(place: Launch) -> Iterator[None]:
    """The group of those processes that a launcher started."""
    join(place.rank, place.world, rendezvous=place.rendezvous)
    try:
        yield
        if place.rank == 0:
            dismiss()
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def assembled(trainer: Trainer) -> Iterator[None]:
    """The group of a run; where no launcher made it, this process starts the others, and they end with it.

    A run of one process is not in need of a group, and gets none unless it is to be DDP.

    Raises:
        Lost: one of them was killed.
        Failure: one of them failed otherwise, and not this one.
    """
    if not trainer.distributed:
        yield
        return
    if distributed.is_initialized():
        try:
            yield
        except RuntimeError as error:
            if _broken(error):
                said = "another process of this run is gone and has said why; the same command goes on with the run"
                raise Failure(said) from error
            raise
        return
    store = meeting_point(0, trainer.devices, first=True)  # at any port that is free
    followers = _Followers(trainer.devices, store.port)
    try:
        try:
            join(0, trainer.devices, store=store)
            yield
            dismiss()
        except RuntimeError as error:
            if _broken(error) and (failure := followers.failure(PATIENCE_S)):
                raise failure from error
            raise
        followers.see_off()
    except SystemExit:  # a signal: all have saved together
        followers.see_off()
        raise
    finally:
        followers.end()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _broken(error: RuntimeError) -> bool:
    """Whether an error is that of a group one of whose processes is gone."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


class _Followers:
    """The processes that this one starts. They die with it, and it does not outlive them for long."""

    def __init__(self, world: int, port: int) -> None:
        self.output = [tempfile.TemporaryFile("w+") for _ in range(1, world)]  # noqa: SIM115 (closed by `end`)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "src.training.follower", str(rank), str(world), str(port)],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # its end is this process's end
                stdout=output,
                stderr=output,
            )
            for rank, output in enumerate(self.output, start=1)
        ]
        self.ended = threading.Event()
        threading.Thread(target=self._watch, name="followers", daemon=True).start()

    def failure(self, patience: float = 0.0) -> Failure | None:
        """How one of them failed, if one did, or does so within `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            for rank, (process, output) in enumerate(zip(self.processes, self.output, strict=True), start=1):
                if code := process.poll():
                    what = f"process {rank} of this run ended"
                    if code < 0:
                        return Lost(f"{what} (signal {-code}, out of memory?); the same command goes on with the run")
                    output.seek(0)
                    said = output.read().strip().splitlines() or [f"exit code {code}"]
                    return Failure(f"{what}: {said[-1]}")
            if time.monotonic() >= until:
                return None
            time.sleep(POLL_S / 10)

    def see_off(self) -> None:
        """Waits for their own end."""
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)

    def end(self) -> None:
        """Ends those that are still there."""
        self.ended.set()
        for process, output in zip(self.processes, self.output, strict=True):
            process.kill()
            process.communicate()
            output.close()

    def _watch(self) -> None:
        """Ends this process where it waits for one that is gone: NCCL would for minutes, a rendezvous for hours."""
        while not self.ended.wait(POLL_S):
            if (failure := self.failure()) and not self.ended.wait(PATIENCE_S):
                os.write(2, f"{failure}\n".encode())
                os._exit(1)


class Group(ClusterEnvironment):
    """What Lightning is told of the group that is there already, so that it neither guesses nor starts anything."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return HOST  # nobody has to be met any more

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return distributed.get_world_size() if distributed.is_initialized() else 1

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return distributed.get_rank() if distributed.is_initialized() else 0

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        place = launch()
        return place.local_rank if place else self.global_rank()

    def node_rank(self) -> int:
        place = launch()
        return place.rank // place.per_node if place else 0


class Joined(DDPStrategy):
    """DDP among the processes of a group that is there already."""

    def _configure_launcher(self) -> None:
        """None: Lightning's would also set another number of threads than the configuration's."""
