"""Bitwise reproducibility: global settings, the random state of each batch, a digest of optimizer states."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from src.common.hardware import cores
from src.data.batching import generator

# cuBLAS needs a fixed workspace for deterministic results; read when the first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def fix(seed: int, threads: int | None) -> None:
    """Seeds torch's global generator and fixes the number of threads, on which the bits depend as well.

    Two settings change the speed alone, as long as all runs share them: denormal numbers become zero (Adam's decaying
    moments ran 2.5 times slower without), and deterministic mode does not fill memory that is about to be written.
    """
    torch.manual_seed(seed)
    # torch counts the cores that the process is bound to, not those of a container's quota.
    if threads or torch.get_num_threads() > cores():
        torch.set_num_threads(threads or cores())
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 on a GPU as well; torch's default for matrices
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set on import


class RandomStatePerBatch(Callback):
    """Sets the global random state from (seed, rank, epoch, batch) before each training batch.

    So dropout draws the same numbers whether the run was interrupted or not: the state is a function of the position
    and needs no saving. Nothing is seeded at an epoch's start: Lightning skips that hook on a resume in mid-epoch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        key = (self.seed, "batch", trainer.global_rank, trainer.current_epoch, batch_idx)
        seed_device(pl_module.device, generator(*key).initial_seed())


def seed_device(device: torch.device, seed: int) -> None:
    """Seeds the CPU's generator and that of `device`.

    torch.manual_seed takes a tenth of a millisecond, in which it notes the call for each kind of device that has not
    been initialized.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def sha256_of_state(state: Any) -> str:
    """The sha256 of nested mappings and lists of tensors and numbers, such as an optimizer's state.

    Equal losses hide differences that a digest of weights and optimizer state shows.
    """
    digest = hashlib.sha256()
    for part in _parts(state):
        digest.update(part)
    return digest.hexdigest()


def _parts(state: Any) -> Iterator[bytes]:
    if isinstance(state, Tensor):
        yield f"{state.dtype}{list(state.shape)}".encode()
        yield state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield f"{key}:".encode()
            yield from _parts(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield b","
            yield from _parts(value)
    else:
        yield repr(state).encode()
