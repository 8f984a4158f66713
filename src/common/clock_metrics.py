"""The tracked metrics that measure time: they differ from run to run, so nothing compares them."""

from __future__ import annotations

import re

EPOCH_SECONDS = "epoch_seconds"
# Of training, of a sweep's objective, and of export: ENGINE_ms_batchSIZE.
_OTHERS = re.compile(r"train_seconds|latency_ms|\w+_ms_batch\d+")


def is_clock_metric(name: str) -> bool:
    """Whether a metric measures time."""
    return name == EPOCH_SECONDS or _OTHERS.fullmatch(name) is not None
