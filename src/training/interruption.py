"""Saves a training while it runs, and ends it in good order on a signal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from src.common.errors import Failure
from src.common.signals import Interruption
from src.training.checkpoints import is_finite

MAX_SAVING_SHARE = 0.02  # of the time
EPOCH_SECONDS = 5.0  # since the last save, after which an epoch's end is saved
AGREE_EVERY = 10  # optimizer steps, where several processes must agree whether to save
CONTINUE, SAVE, STOP = range(3)  # the largest one that any process chooses is done by all


class WorkingCheckpoint(Checkpoint):
    """Saves `path` every `seconds` and at epochs' ends, and ends the run on a signal, after a save.

    An epoch's end is saved if `EPOCH_SECONDS` have passed: a GPU may need less for an epoch than a save takes. Both are
    stretched where saving takes long, so that it costs no more than `MAX_SAVING_SHARE` of the time; with `seconds` 0
    every optimizer step and every epoch is saved. Values that are NaN or infinite are never saved, nor validated as the
    best.

    Raises:
        Failure: the training loss, a weight or the optimizer's state is NaN or infinite.
        SystemExit: on a signal; 143 or 130.
    """

    def __init__(self, path: Path, seconds: float, interruption: Interruption) -> None:
        self.path = path
        self.seconds = seconds
        self.interruption = interruption
        self._last_save = 0.0
        self._saving_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.install()  # again: Lightning has just put its own handlers in
        self._last_save = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set at run time
            check_losses(trainer, pl_module)
        if trainer.is_last_batch:  # the epoch's end follows, after the validation
            return
        steps, pending = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if pending:  # gradients that wait for the next step are not saved
            return
        if trainer.world_size > 1 and self.seconds and (steps - 1) % AGREE_EVERY:
            return
        action = max_over_ranks(trainer, self._action(self.seconds))
        if action >= SAVE:
            check(trainer, pl_module)
        self._carry_out(action, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_weights(trainer, pl_module)  # the accuracy of infinite weights is finite

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A sweep's pruner, for one, stops the first process alone.
        trainer.should_stop = bool(max_over_ranks(trainer, int(trainer.should_stop)))
        check(trainer, pl_module)
        action = max_over_ranks(trainer, self._action(min(self.seconds, EPOCH_SECONDS)))
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        self._carry_out(min(action, SAVE) if is_last else action, trainer)

    def _action(self, seconds: float) -> int:
        """What this process would do, `seconds` being those between two saves."""
        if self.interruption:
            return STOP
        wait = max(seconds, self._saving_seconds / MAX_SAVING_SHARE) if seconds else 0.0
        return SAVE if time.monotonic() >= self._last_save + wait else CONTINUE

    def _carry_out(self, action: int, trainer: Trainer) -> None:
        if action >= SAVE:
            started = time.monotonic()
            trainer.save_checkpoint(self.path, weights_only=False)  # with the optimizers' state
            self._last_save = time.monotonic()
            self._saving_seconds = self._last_save - started
        if action == STOP:
            raise SystemExit(self.interruption.exit_code)


def max_over_ranks(trainer: Trainer, value: int) -> int:
    """The largest value of all processes, so that they save, or stop, together or not at all."""
    if trainer.world_size == 1:
        return value
    largest = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Checks the epoch's losses, and what the last step made of the weights: its loss was computed before it.

    Raises:
        Failure: one of them is NaN or infinite.
    """
    check_losses(trainer, pl_module)
    check_weights(trainer, pl_module)


def check_losses(trainer: Trainer, pl_module: LightningModule) -> None:
    """Checks the losses of this epoch, in all processes.

    Raises:
        Failure: one of them is NaN or infinite.
    """
    losses = [value for key, value in trainer.callback_metrics.items() if "loss" in key]
    sums = getattr(pl_module, "train_sums", None)
    if sums is not None:
        losses.append(sums)
    _require_finite(trainer, all(bool(value.isfinite().all()) for value in losses), "the loss")


def check_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Checks the weights, statistics such as batch norm's, and the optimizers' state, in all processes.

    Adam's second moment becomes infinite where a gradient's square does: the losses stay finite and the weight
    stands still.

    Raises:
        Failure: one of them is NaN or infinite.
    """
    optimizers = [list(optimizer.state.values()) for optimizer in trainer.optimizers]
    _require_finite(trainer, is_finite([pl_module.state_dict(), optimizers]), "a weight or the optimizer's state")


def _require_finite(trainer: Trainer, is_finite: bool, what: str) -> None:
    if not max_over_ranks(trainer, int(not is_finite)):
        return
    raise Failure(
        f"{what} became NaN or infinite in epoch {trainer.current_epoch + 1}: "
        "lower model.optimizer.lr, or set trainer.gradient_clip. The checkpoint of the last good step stays; "
        "the same configuration would go on to the same NaN"
    )
