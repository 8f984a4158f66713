"""Losses summed over an epoch, on the device, through interruptions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

Task = Literal["classification", "translation", "reconstruction", "generation"]


class Summing(LightningModule):
    """Keeps float64 sums of each epoch's losses and counts: `train_sums` and `val_sums`.

    They are read once an epoch: a `self.log` at each step costs 200 us. Those of training are part of a checkpoint,
    each process's own, so that a run which goes on in mid-epoch reports the whole of it.

    `task` says what the model does, whatever its data: by it the stages choose how to evaluate, export and call it.
    """

    task: ClassVar[Task]

    def __init__(self, train: tuple[int, ...], val: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("train_sums", torch.zeros(train, dtype=torch.float64), persistent=False)
        self.register_buffer("val_sums", torch.zeros(val, dtype=torch.float64), persistent=False)
        self.train_sums: Tensor
        self.val_sums: Tensor
        # Each process's own: DDP would overwrite them with the first one's before each step.
        self._ddp_params_and_buffers_to_ignore = ["train_sums", "val_sums"]

    def take(self, split: Literal["train", "val"]) -> Tensor:
        """The sums over all processes, on the CPU; they begin at zero again."""
        sums = self.train_sums if split == "train" else self.val_sums
        total: Tensor = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        sums.zero_()
        return total.cpu()

    def on_validation_epoch_start(self) -> None:
        self.val_sums.zero_()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        every = self.trainer.strategy.all_gather(self.train_sums)
        checkpoint["train_sums"] = every.view(self.trainer.world_size, *self.train_sums.shape).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.train_sums.copy_(checkpoint["train_sums"][self.trainer.global_rank])
