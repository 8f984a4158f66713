"""Metrics as a task declares them: which direction is better, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Direction = Literal["max", "min"]

SPLITS = ("train", "val", "test")  # a metric is logged as SPLIT_NAME


@dataclass(frozen=True)
class Metric:
    """A figure of a model. One table of a task's metrics decides monitor, objectives, verdicts and titles.

    `better` None: shown, but neither more nor less of it is an improvement. Metrics of one title share a panel of the
    training curves; all fractions (0..1, shown as percent) share another. `is_validated`: validation measures it after
    an epoch, so that `trainer.monitor` and a sweep's objectives may name it, as val_NAME.
    """

    better: Direction | None
    title: str
    is_fraction: bool = False
    is_validated: bool = False


# What every run logs without a split's name, whatever its task.
COMMON: Mapping[str, Metric] = {
    "lr": Metric(None, "learning rate"),
    "parameters": Metric("min", "parameters"),
    "latency_ms": Metric("min", "latency, ms"),
}


def metric_logged_as(key: str, metrics: Mapping[str, Metric]) -> Metric | None:
    """The metric behind a logged name such as `val_accuracy` or `lr`; None: neither the task nor `COMMON` has it."""
    split, _, name = key.partition("_")
    return metrics.get(name) if split in SPLITS else COMMON.get(key)


def monitors(metrics: Mapping[str, Metric]) -> dict[str, Direction]:
    """What `trainer.monitor` and a sweep's objectives may name, with the better direction."""
    return {f"val_{name}": metric.better for name, metric in metrics.items() if metric.is_validated and metric.better}
