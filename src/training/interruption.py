"""Interruption costs nothing: checkpoints within an epoch, and signals that end a run in good order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from src.common.errors import Failure
from src.common.signals import Interruption

SHARE = 0.02  # of the time at most goes into saving within an epoch
ASK_EVERY = 10  # batches, where several processes must agree whether to save
GO_ON, SAVE, END = range(3)


class WorkingCheckpoint(Checkpoint):
    """Saves `path` every `seconds` and at each epoch's end, and ends the run on a signal, once it is saved.

    `seconds` are stretched where saving takes long, so that it costs no more than `SHARE` of the time; 0 saves after
    every batch. What has become NaN is never saved.

    Raises:
        Failure: the training loss is no number any more.
        SystemExit: a signal asked for it; 143 or 130.
    """

    def __init__(self, path: Path, seconds: float, interruption: Interruption) -> None:
        self.path = path
        self.seconds = seconds
        self.interruption = interruption
        self._next = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.install()  # again: Lightning has just put its own handlers in
        self._next = time.monotonic() + self.seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set at run time
            refuse_nan(trainer, pl_module)
        if trainer.is_last_batch:  # validation is next, then the epoch's end saves
            return
        wanted = self._wanted(trainer, batch_idx)
        if wanted >= SAVE:
            self._save(trainer, pl_module)
        if wanted == END:
            raise SystemExit(self.interruption.exit_code)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A sweep's pruner, for one, speaks to the first process alone.
        trainer.should_stop = bool(agreed(trainer, trainer.should_stop))
        self._save(trainer, pl_module)
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if not last and agreed(trainer, END if self.interruption.signal else GO_ON) == END:
            raise SystemExit(self.interruption.exit_code)

    def _wanted(self, trainer: Trainer, batch_idx: int) -> int:
        if trainer.world_size > 1 and self.seconds and batch_idx % ASK_EVERY:
            return GO_ON
        mine = END if self.interruption.signal else SAVE if time.monotonic() >= self._next else GO_ON
        return agreed(trainer, mine)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_nan(trainer, pl_module)
        begun = time.monotonic()
        trainer.save_checkpoint(self.path, weights_only=False)  # with the optimizers' state
        now = time.monotonic()
        self._next = now + (max(self.seconds, (now - begun) / SHARE) if self.seconds else 0.0)


def agreed(trainer: Trainer, mine: int) -> int:
    """The most that any process wants: they save, or end, together or not at all."""
    if trainer.world_size == 1:
        return mine
    most = torch.tensor(int(mine), device=trainer.strategy.root_device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def refuse_nan(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises Failure when a loss of this epoch has a NaN or an infinity in it, in whichever process."""
    losses = [value for key, value in trainer.callback_metrics.items() if "loss" in key]
    sums = getattr(pl_module, "train_sums", None)
    if sums is not None:
        losses.append(sums)
    if not agreed(trainer, not all(bool(value.isfinite().all()) for value in losses)):
        return
    raise Failure(
        f"the loss became NaN or infinite in epoch {trainer.current_epoch + 1}: "
        "lower model.optimizer.lr, or set trainer.gradient_clip. The checkpoint of the last good step stays; "
        "the same configuration would go on to the same NaN"
    )
