"""Latency: the median of repeated calls."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

MOST_CALLS, LEAST_CALLS = 1000, 3


def median_ms(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median milliseconds of each call over `seconds`, after a call to warm up.

    Calls take turns, so that a noisy moment hits all alike.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    for turn in range(1, MOST_CALLS + 1):
        for call, milliseconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            milliseconds.append(1000 * (time.perf_counter() - start))
        if turn >= LEAST_CALLS and time.perf_counter() > end:
            break
    return [statistics.median(milliseconds) for milliseconds in times]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread within it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
