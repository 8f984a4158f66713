"""The process group that trains one model: how it is formed, watched and closed.

The first process prepares, reports and writes. The others (`src.training.follower_main`) train what it broadcasts.
torchrun or srun has started them all, or else the first one starts the others.
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
from torch.distributed import distributed_c10d

from src.common.errors import Failure, Lost
from src.common.paths import ROOT
from src.configuration.schema import Trainer
from src.training.launcher import PEER_TIMEOUT_S, Launch, read_launch

HOST = "127.0.0.1"
# The others wait this long for the first one to prepare the data; a dead process is noticed by its closed connections.
PREPARATION_TIMEOUT = timedelta(hours=2)
POLL_S = 0.5

Value = TypeVar("Value")


def tcp_store(port: int, world_size: int, *, is_host: bool = False) -> Any:
    """The TCPStore for the rendezvous on this machine; the first process hosts it."""
    return distributed.TCPStore(HOST, port, world_size, is_master=is_host, wait_for_workers=False)  # type: ignore[attr-defined]


def init_group(rank: int, world_size: int, *, store: Any = None, rendezvous: str | None = None) -> None:
    """Initializes the process group: CPU tensors go through gloo, GPU tensors through NCCL."""
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        rank=rank,
        world_size=world_size,
        store=store,
        init_method=rendezvous,
        timeout=PREPARATION_TIMEOUT,
    )


def broadcast(value: Value) -> Value:
    """The first process's value, in all processes of the run."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def stop_followers() -> None:
    """Tells the other processes that there is nothing more to train."""
    broadcast(None)


def abort_group() -> None:
    """Leaves the process group without the others: the orderly end of NCCL waits until all of them end theirs."""
    if distributed.is_initialized() and torch.cuda.is_available():
        distributed_c10d._abort_process_group()  # for NCCL alone (torch 2.12.1)


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """Leaves the process group after the block: together with the others, or at once where the block failed."""
    try:
        yield
    except Exception:
        abort_group()
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextlib.contextmanager
def launched_group(launch: Launch) -> Iterator[None]:
    """The group of the processes that a launcher started."""
    init_group(launch.rank, launch.world_size, rendezvous=launch.rendezvous)
    with leaving_group():
        yield
        if launch.rank == 0:
            stop_followers()


@contextlib.contextmanager
def run_group(trainer: Trainer) -> Iterator[None]:
    """The group of a run; without a launcher, this process starts the others, and they end with it.

    A single process gets a process group only with `strategy=ddp`.

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
            if _is_lost_peer(error):
                message = "another process of this run is gone and has said why; the same command goes on with the run"
                raise Failure(message) from error
            raise
        return
    store = tcp_store(0, trainer.devices, is_host=True)  # at any free port
    followers = _Followers(trainer.devices, store.port)
    try:
        with leaving_group():
            init_group(0, trainer.devices, store=store)
            yield
            stop_followers()
        followers.wait()
    except SystemExit:  # a signal: all have saved together
        followers.wait()
        raise
    except RuntimeError as error:
        if _is_lost_peer(error) and (failure := followers.failure(PEER_TIMEOUT_S)):
            raise failure from error
        raise
    finally:
        followers.kill()


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error is that of a group that has lost a process."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


class _Followers:
    """The processes that this one starts. They die with it, and it ends soon after one of them has died."""

    def __init__(self, world_size: int, port: int) -> None:
        self.output = [tempfile.TemporaryFile("w+") for _ in range(1, world_size)]  # noqa: SIM115 (closed by `kill`)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "src.training.follower_main", str(rank), str(world_size), str(port)],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # it closes when this process ends
                stdout=output,
                stderr=output,
            )
            for rank, output in enumerate(self.output, start=1)
        ]
        self.is_closing = threading.Event()
        threading.Thread(target=self._watch, name="followers", daemon=True).start()

    def failure(self, timeout_s: float = 0.0) -> Failure | None:
        """The failure of one of them, if one has failed or does so within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            for rank, (process, output) in enumerate(zip(self.processes, self.output, strict=True), start=1):
                if code := process.poll():
                    ended = f"process {rank} of this run ended"
                    if code < 0:
                        return Lost(f"{ended} (signal {-code}, out of memory?); the same command goes on with the run")
                    output.seek(0)
                    lines = output.read().strip().splitlines() or [f"exit code {code}"]
                    return Failure(f"{ended}: {lines[-1]}")
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S / 10)

    def wait(self) -> None:
        """Waits for them to exit by themselves."""
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PEER_TIMEOUT_S)

    def kill(self) -> None:
        """Kills those that are still running."""
        self.is_closing.set()
        for process, output in zip(self.processes, self.output, strict=True):
            process.kill()
            process.communicate()
            output.close()

    def _watch(self) -> None:
        """Ends this process after a follower died: NCCL would wait for it for minutes, a rendezvous for hours."""
        while not self.is_closing.wait(POLL_S):
            if (failure := self.failure()) and not self.is_closing.wait(PEER_TIMEOUT_S):
                os.write(2, f"{failure}\n".encode())
                os._exit(1)


class ExistingGroup(ClusterEnvironment):
    """Describes the existing process group to Lightning, so that it neither detects nor starts anything."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return HOST  # unused: the group is formed

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
        launch = read_launch()
        return launch.local_rank if launch else self.global_rank()

    def node_rank(self) -> int:
        launch = read_launch()
        return launch.rank // launch.per_node if launch else 0


class ExistingGroupDDP(DDPStrategy):
    """DDP over the existing process group. Overrides a private method, checked with Lightning 2.6.6."""

    def _configure_launcher(self) -> None:
        """No-op: Lightning's launcher would also change the number of threads."""
