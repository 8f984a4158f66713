"""Timing on a shared machine: candidates take turns, and only ratios within a round are meaningful."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Measure = Callable[[], float]  # returns seconds per unit of work, measured once


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and their range."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Rounds:
    """Seconds of each candidate, one value per round."""

    seconds: dict[str, list[float]]

    def spread(self, name: str, unit: Callable[[float], float] = lambda seconds: seconds) -> Spread:
        """One candidate's rounds, converted by `unit`."""
        return spread([unit(value) for value in self.seconds[name]])

    def ratio(self, above: str, below: str, factor: float = 1.0) -> Spread:
        """`factor` times the time of `above` over that of `below`, round by round."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return spread([factor * a / b for a, b in pairs])


def spread(values: Sequence[float]) -> Spread:
    """The median and the range of some values."""
    return Spread(median(values), min(values), max(values))


def paired(candidates: Mapping[str, Measure], rounds: int) -> Rounds:
    """Measures all candidates in each round, in turn: A B, B A, A B, ...

    Load that lasts longer than a round slows all candidates; slow drift and warm caches favour none of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates)[:: -1 if number % 2 else 1]:
            seconds[name].append(candidates[name]())
    return Rounds(seconds)


def per_call(call: Callable[[], object], seconds: float) -> Measure:
    """Measures the mean time of a call over at least `seconds`, after a first one to warm up. The call awaits a GPU."""
    call()

    def measure() -> float:
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or not count:
            call()
            count += 1
        return spent / count

    return measure


class StepClock:
    """Times a training loop of `steps` steps, at least two, that calls `tick` at the end of each.

    Measures from the end of the first step, which allocates and warms up, to the end of the last one.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ticks = 0
        self.times: list[float] = []

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks in (1, self.steps):
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    @property
    def per_step(self) -> float:
        """Seconds."""
        first, last = self.times
        return (last - first) / (self.steps - 1)
