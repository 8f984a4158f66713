"""Lightning's `Logger` over the tracker, for callbacks that need one, such as LearningRateMonitor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning.loggers import Logger

LogMetrics = Callable[[Mapping[str, float], int], None]


class TrackerLogger(Logger):
    """Passes to the tracker what callbacks log, and the training's own history, each metric once.

    `log_metrics` is the tracker's method; None in all processes of a run but the first, which log nothing.
    """

    def __init__(self, log_metrics: LogMetrics | None) -> None:
        super().__init__()
        self._log_metrics = log_metrics
        self._names: set[str] = set()  # of the metrics that callbacks log

    @property
    def name(self) -> str:
        return "tracker"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """No-op: a run's parameters are those of its configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs a callback's metrics.

        Lightning also forwards everything that a model logs, with `epoch` added (checked with 2.6.6): that is the
        history's, with steps of its own, and is left out.
        """
        if self._log_metrics and "epoch" not in metrics:
            self._names.update(metrics)
            self._log_metrics(metrics, step or 0)

    def log_history(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs the training's own metrics, without those that a callback logs by itself."""
        if self._log_metrics:
            self._log_metrics({key: value for key, value in metrics.items() if key not in self._names}, step)
