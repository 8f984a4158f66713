"""Whether a difference between runs is one: means over seeds, their intervals, paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05  # of the tests, and of the intervals: 95 %
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Summary:
    """A metric over seeds: mean, sample standard deviation and the 95 % confidence interval of the mean (Student's t).

    One seed alone has neither deviation nor interval.
    """

    count: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Test:
    """A metric of a variant less that of another, over the seeds that they share."""

    seeds: int
    difference: float
    low: float | None
    high: float | None
    p: float | None  # of the paired t-test, two-sided, after Holm's correction; None: too few seeds to test
    verdict: str


def summarised(values: Sequence[float]) -> Summary | None:
    """Mean, deviation and interval of a metric's values; None of none."""
    if not values:
        return None
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Summary(1, mean, None, None, None)
    deviation = statistics.stdev(values)
    half = _half_width(count, deviation)
    return Summary(count, mean, deviation, mean - half, mean + half)


def tested(differences: Mapping[int, Sequence[float]], *, less_is_better: bool) -> dict[int, Test]:
    """Paired t-tests of several variants against one; `differences`: by variant, the differences seed by seed.

    The p-values carry Holm's correction (1979): of twenty variants that change nothing, one would be "significant".
    """
    raw = {number: _p(values) for number, values in differences.items()}
    corrected: dict[int, float] = {}
    reached = 0.0
    tried = sorted((p, number) for number, p in raw.items() if p is not None)
    for place, (p, number) in enumerate(tried):
        reached = max(reached, min(1.0, (len(tried) - place) * p))
        corrected[number] = reached
    return {number: _test(values, corrected.get(number), less_is_better) for number, values in differences.items()}


def _test(values: Sequence[float], p: float | None, less_is_better: bool) -> Test:
    found = summarised(values)
    if found is None:
        return Test(0, math.nan, None, None, None, "not tested: no seed in common")
    if p is None:
        return Test(1, found.mean, None, None, None, "not tested: one seed in common; two at least are needed")
    better = (found.mean < 0) == less_is_better
    verdict = NO_DIFFERENCE if p >= LEVEL else "better" if better else "worse"
    return Test(found.count, found.mean, found.low, found.high, p, verdict)


def _p(values: Sequence[float]) -> float | None:
    """Of the two-sided t-test that the differences' mean is zero; None of fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return None
    deviation, mean = statistics.stdev(values), statistics.fmean(values)
    if deviation == 0:  # runs are reproducible: a setting without effect gives the very same values
        return 0.0 if mean else 1.0
    t = mean / (deviation / math.sqrt(len(values)))
    return float(2 * stats.t.sf(abs(t), len(values) - 1))


def _half_width(count: int, deviation: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * deviation / math.sqrt(count)
