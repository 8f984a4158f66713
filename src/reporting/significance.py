"""Statistics over seeds: means with confidence intervals, and paired t-tests with Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05  # significance level of the tests; the intervals are 95 %
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Summary:
    """A metric over seeds: mean, sample standard deviation and the 95 % confidence interval of the mean (Student's t).

    A single seed has neither deviation nor interval.
    """

    count: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedTest:
    """A metric of one variant minus that of another, over the seeds that both have."""

    seeds: int
    difference: float
    low: float | None
    high: float | None
    p: float | None  # two-sided paired t-test after Holm's correction; None: not tested, see `verdict`
    verdict: str


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, deviation and interval of a metric's values; None without values."""
    from scipy import stats

    if not values:
        return None
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Summary(1, mean, None, None, None)
    deviation = statistics.stdev(values)
    half_width = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * deviation / math.sqrt(count)
    return Summary(count, mean, deviation, mean - half_width, mean + half_width)


def paired_tests(differences: Mapping[int, Sequence[float]], *, less_is_better: bool) -> dict[int, PairedTest]:
    """Paired t-tests of several variants against one; `differences`: for each variant, one difference per seed.

    Holm's correction (1979) is applied over all of them: of twenty variants without effect, one would otherwise be
    "significant".
    """
    p_values = {variant: p for variant, values in differences.items() if (p := _p_value(values)) is not None}
    corrected: dict[int, float] = {}
    largest = 0.0
    for rank, variant in enumerate(sorted(p_values, key=lambda variant: (p_values[variant], variant))):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[variant]))
        corrected[variant] = largest
    return {
        variant: _paired_test(values, corrected.get(variant), less_is_better) for variant, values in differences.items()
    }


def _paired_test(values: Sequence[float], p: float | None, less_is_better: bool) -> PairedTest:
    summary = summarize(values)
    if summary is None:
        return PairedTest(0, math.nan, None, None, None, "not tested: no seed in common")
    if p is None:
        reason = (
            "the differences are equal; add seeds" if len(values) > 1 else "one seed in common; at least two are needed"
        )
        return PairedTest(summary.count, summary.mean, summary.low, summary.high, None, f"not tested: {reason}")
    is_better = (summary.mean < 0) == less_is_better
    verdict = NO_DIFFERENCE if p >= LEVEL else "better" if is_better else "worse"
    return PairedTest(summary.count, summary.mean, summary.low, summary.high, p, verdict)


def _p_value(values: Sequence[float]) -> float | None:
    """The two-sided p-value of a zero mean difference; None if fewer than two values, or all equal and not zero.

    Equal differences have no deviation to test against: metrics of a few hundred images are multiples of one image, so
    two seeds often differ by the same amount. Differences of zero mean that the setting has no effect: runs are
    reproducible.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    if not any(values):
        return 1.0
    if max(values) - min(values) <= 1e-9 * max(map(abs, values)):  # equal up to rounding
        return None
    return float(stats.ttest_1samp(values, 0).pvalue)
