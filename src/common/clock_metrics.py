"""Names of the tracked metrics that measure time, which differ from run to run: nothing compares them."""

from __future__ import annotations

import re

TRAIN_SECONDS = "train_seconds"
EPOCH_SECONDS = "epoch_seconds"
LATENCY = "latency_ms"  # an objective of sweeps


def latency_metric(engine: str, batch_size: int) -> str:
    """The name under which the milliseconds of a batch are tracked."""
    return f"{engine}_ms_batch{batch_size}"


def is_clock_metric(name: str) -> bool:
    """Whether a metric measures time."""
    return name in (TRAIN_SECONDS, EPOCH_SECONDS, LATENCY) or re.fullmatch(r"\w+_ms_batch\d+", name) is not None
