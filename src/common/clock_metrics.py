"""The tracked metrics that measure time or the machine: they differ from run to run, so nothing compares them."""

from __future__ import annotations

import re

EPOCH_SECONDS = "epoch_seconds"
SYSTEM = "system/"  # MLflow's prefix of what its page of system metrics shows
# Of training, of a sweep's objective, and of export: ENGINE_ms_batchSIZE.
_OTHERS = re.compile(r"train_seconds|latency_ms|\w+_ms_batch\d+")


def is_clock_metric(name: str) -> bool:
    """Whether a metric measures time, or the load of the machine."""
    return name == EPOCH_SECONDS or name.startswith(SYSTEM) or _OTHERS.fullmatch(name) is not None
