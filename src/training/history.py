"""The history of a training: a row of metrics for each epoch, saved in checkpoints, printed and tracked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, Checkpoint, RichProgressBar

from src.common.console import console
from src.common.errors import Failure

LogMetrics = Callable[[Mapping[str, float], int], None]


class History(Checkpoint):
    """Collects each epoch's metrics, and passes them to `log_metrics` (metrics, step).

    Lightning calls callbacks of the class `Checkpoint` last, when all metrics of an epoch are logged; hence the base.
    Rows and seconds are saved in checkpoints, so the history of a resumed run is complete.
    """

    def __init__(self, log_metrics: LogMetrics, *, prints_lines: bool) -> None:
        self.log_metrics = log_metrics
        self.prints_lines = prints_lines
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._started = 0.0
        self._epoch_seconds = 0.0  # of the current epoch, before an interruption
        self._has_validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set at run time
            step = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
            points = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("loss")}
            self.log_metrics(points, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = self._elapsed()
        self.seconds, self._epoch_seconds, self._started = self.seconds + seconds, 0.0, time.perf_counter()
        # Lightning keeps the last validation's figures over epochs that have none.
        excluded = "loss" if self._has_validated else ("loss", "val_")
        self._has_validated = False
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if not key.startswith(excluded)}
        row = {"epoch": trainer.current_epoch + 1, **dict(sorted(metrics.items()))}
        self.rows.append(row)
        self.log_metrics(metrics | {"epoch_seconds": seconds}, trainer.current_epoch + 1)
        if self.prints_lines:
            values = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
            console.print(f"epoch {row['epoch']}/{trainer.max_epochs}  {seconds:.1f} s  {values}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_validated = True

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds, "epoch_seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.seconds = state_dict["seconds"]
        self._epoch_seconds = state_dict["epoch_seconds"]

    def _elapsed(self) -> float:
        """Seconds of the current epoch, without interruptions."""
        return self._epoch_seconds + time.perf_counter() - self._started


class RequireMonitor(Callback):
    """Fails at the first validation where the metric of `trainer.monitor` is not among those logged.

    Raises:
        Failure: with the metrics that were logged.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A metric of the training is logged after the validation.
        if self.monitor not in trainer.callback_metrics and not self.monitor.startswith("train_"):
            names = ", ".join(sorted(key for key in trainer.callback_metrics if key.startswith("val_"))) or "none"
            raise Failure(f"trainer.monitor: {self.monitor!r} was not logged by the validation; these were: {names}")


def is_terminal() -> bool:
    """Whether stdout is a terminal: it gets a live bar, anything else plain lines."""
    return sys.stdout.isatty()


def progress_bar() -> RichProgressBar:
    """Lightning's live bar, drawn ten times a second (its own 100 slow short steps); it stays on the screen."""
    return RichProgressBar(refresh_rate=10, leave=True)
