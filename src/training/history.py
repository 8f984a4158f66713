"""What a training reports while it runs: a row for each epoch, kept through interruptions, printed and tracked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, RichProgressBar

LogMetrics = Callable[[Mapping[str, float], int], None]


class History(Checkpoint):
    """Collects each epoch's metrics.

    A `Checkpoint` by base class only: those run last at an epoch's end, when all is logged. Its rows and
    seconds are part of the checkpoint, so that a resumed run's history is whole.
    """

    def __init__(self, log_metrics: LogMetrics, *, lines: bool) -> None:
        self.log_metrics = log_metrics
        self.lines = lines
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._since = 0.0
        self._epoch_seconds = 0.0  # of the epoch in hand, before an interruption
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set at run time
            step = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
            points = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("loss")}
            self.log_metrics(points, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = self._elapsed()
        self.seconds, self._epoch_seconds, self._since = self.seconds + seconds, 0.0, time.perf_counter()
        # Lightning keeps the last validation's figures over epochs that have none.
        left_out = "loss" if self._validated else ("loss", "val_")
        self._validated = False
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if not key.startswith(left_out)}
        row = {"epoch": trainer.current_epoch + 1, **dict(sorted(metrics.items()))}
        self.rows.append(row)
        self.log_metrics(metrics | {"epoch_seconds": seconds}, trainer.current_epoch + 1)
        if self.lines:
            shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
            print(f"epoch {row['epoch']}/{trainer.max_epochs}  {seconds:.1f} s  {shown}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds, "epoch_seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.seconds = state_dict["seconds"]
        self._epoch_seconds = state_dict["epoch_seconds"]

    def _elapsed(self) -> float:
        """Seconds of the epoch in hand, interruptions left out."""
        return self._epoch_seconds + time.perf_counter() - self._since


def on_terminal() -> bool:
    """Whether somebody watches: a live bar then, plain lines otherwise."""
    return sys.stdout.isatty()


def progress_bar() -> RichProgressBar:
    """Lightning's live bar, left on the screen when done."""
    return RichProgressBar(leave=True)
