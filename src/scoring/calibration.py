"""Calibration of a classifier: how far its confidence is from its accuracy, bin by bin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """Equal-width bins of confidence, each open below and closed above, with what happened in them.

    confidence: float [N] in 0..1; correct: bool [N]. A row has low, high, count, confidence and accuracy (the means
    of the bin; NaN where it is empty). ValueError for no examples, and for values that are not probabilities.
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    # A float32 softmax may sum to a hair above one.
    if not confidence.size or not np.all((confidence >= 0) & (confidence <= 1 + 1e-5)):
        raise ValueError("calibration: confidences must be numbers in 0..1, at least one; pass softmax's largest value")
    edges = np.linspace(0, 1, bins + 1)
    index = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(index, minlength=bins)
    # An empty bin divides by NaN rather than by zero: NaN without a warning.
    divisor = np.where(count, count, np.nan)
    mean = np.bincount(index, confidence, minlength=bins) / divisor
    accuracy = np.bincount(index, np.asarray(correct, dtype=np.float64), minlength=bins) / divisor
    columns = (edges[:-1], edges[1:], count, mean, accuracy)
    names = ("low", "high", "count", "confidence", "accuracy")
    return [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]


def calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error in 0..1 of `calibration_bins`: the mean over examples of |accuracy - confidence|.

    Guo et al., On Calibration of Modern Neural Networks, 2017. Not torchmetrics': that puts a confidence of exactly 1,
    which a saturated softmax gives often, into a bin of its own.
    """
    filled = [row for row in bins if row["count"]]
    return sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in filled) / sum(
        row["count"] for row in filled
    )
