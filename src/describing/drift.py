"""Whether new examples come from the distribution of the old ones: a statistical test for each feature.

Numeric features: the two-sample test of Kolmogorov and Smirnov, by its asymptotic distribution. Categorical ones: the
chi-squared test of homogeneity.
p-values are corrected for their number by Benjamini and Hochberg (1995). Of many examples every difference is
significant: a drift is one that is also large, which the effect size tells. Both effects are the largest difference in
the share of examples: 0.1 says that one in ten moved.

scipy rather than a library for drift (evidently, alibi-detect): the tests are its own two functions, while those bring
a tree of packages, pages with scripts, and defaults in which the size of an effect has no say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from src.describing import Examined

SIGNIFICANCE = 0.01  # of the corrected p-values
EFFECT = 0.1  # share of examples from which on a difference is a drift
CRITICAL = 1.628  # of Kolmogorov's distribution at SIGNIFICANCE
VALUES = 200  # of a categorical feature that are told apart, the most frequent
EXPECTED = 5  # occurrences below which the chi-squared test is not valid: rarer values are taken together
KOLMOGOROV, CHI_SQUARED = "Kolmogorov-Smirnov", "chi-squared"


@dataclass(frozen=True)
class Test:
    """One feature's test; `change` says from what to what, in words; `p` is corrected for the number of tests."""

    feature: str
    name: str
    effect: float
    p: float
    change: str

    @property
    def is_drift(self) -> bool:
        """Whether the difference is significant and large."""
        return self.p < SIGNIFICANCE and self.effect >= EFFECT


def compare(reference: Examined, new: Examined) -> list[Test]:
    """Tests each feature that both have; the largest effects first."""
    from scipy.stats import false_discovery_control

    tests = [*_numeric(reference, new), *_categorical(reference, new)]
    if not tests:
        return []
    corrected = false_discovery_control([test.p for test in tests]).tolist()
    tests = [replace(test, p=p) for test, p in zip(tests, corrected, strict=True)]
    return sorted(tests, key=lambda test: (not test.is_drift, -test.effect))


def may_differ(reference: Examined, new: Examined) -> bool:
    """Whether a test could find a drift: effects alone, without scipy, whose import takes longer than a small report.

    A gap of numeric features is weighed against the critical value of the asymptotic test, before any correction.
    """
    for name, old in reference.numbers.items():
        values = new.numbers.get(name, np.empty(0))
        sizes = len(old), len(values)
        if all(sizes) and largest_gap(old, values) >= max(EFFECT, CRITICAL * (sum(sizes) / np.prod(sizes)) ** 0.5):
            return True
    return any(
        moved_share(_table(old, new.categories[name])) >= EFFECT
        for name, old in reference.categories.items()
        if name in new.categories
    )


def largest_gap(first: np.ndarray, second: np.ndarray) -> float:
    """The statistic of Kolmogorov and Smirnov: the largest difference between two distribution functions, 0..1."""
    if not (len(first) and len(second)):
        return 0.0
    parts = np.sort(first), np.sort(second)
    values = np.concatenate(parts)  # in order: looked up several times as fast
    shares = [np.searchsorted(part, values, "right") / len(part) for part in parts]
    return float(np.abs(shares[0] - shares[1]).max())


def moved_share(table: np.ndarray) -> float:
    """The total variation distance of two distributions, 0..1, from their counts int [2, K]."""
    if not table.sum(1).all():
        return 0.0
    shares = table / table.sum(1, keepdims=True)
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def _numeric(reference: Examined, new: Examined) -> Iterator[Test]:
    from scipy.stats import kstwobign

    for name, old in reference.numbers.items():
        values = new.numbers.get(name, np.empty(0))
        if not (len(old) and len(values)):
            continue
        gap = largest_gap(old, values)
        p = kstwobign.sf(gap * (len(old) * len(values) / (len(old) + len(values))) ** 0.5)
        change = f"median {np.median(old):.4g} -> {np.median(values):.4g}"
        yield Test(name, KOLMOGOROV, gap, float(p), change)


def _categorical(reference: Examined, new: Examined) -> Iterator[Test]:
    from scipy.stats import chi2_contingency

    for name, old in reference.categories.items():
        counts = new.categories.get(name)
        if counts is None or not (sum(old.values()) and sum(counts.values())):
            continue
        table = _table(old, counts)
        if table.shape[1] < 2:
            yield Test(name, CHI_SQUARED, 0.0, 1.0, "one value")
            continue
        yield Test(name, CHI_SQUARED, moved_share(table), float(chi2_contingency(table)[1]), _largest_move(old, counts))


def _table(old: Mapping[str, int], new: Mapping[str, int]) -> np.ndarray:
    """Occurrences of the most frequent values in both, int [2, K]; those too rare for the test in the last column."""
    values = sorted(old.keys() | new.keys(), key=lambda value: (-old.get(value, 0) - new.get(value, 0), value))
    table = np.array([[counts.get(value, 0) for value in values[:VALUES]] for counts in (old, new)])
    expected = table.sum(0) * (table.sum(1).min() / max(1, table.sum()))
    is_rare = expected < EXPECTED
    rare = table[:, is_rare].sum(1, keepdims=True)
    return np.concatenate([table[:, ~is_rare], *([rare] if rare.any() else [])], axis=1)


def _largest_move(old: Mapping[str, int], new: Mapping[str, int]) -> str:
    """The value whose share changed most."""
    totals = max(1, sum(old.values())), max(1, sum(new.values()))
    moves = {value: new.get(value, 0) / totals[1] - old.get(value, 0) / totals[0] for value in old.keys() | new.keys()}
    value = max(sorted(moves), key=lambda name: abs(moves[name]))
    return f"{value} {100 * old.get(value, 0) / totals[0]:.3g} % -> {100 * new.get(value, 0) / totals[1]:.3g} %"
