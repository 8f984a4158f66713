"""How far the outputs of an exported graph are from PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def absolute_difference(
    expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], model: object, tolerance: float
) -> float:
    """The largest absolute difference between two lists of outputs of the same shapes; NaN if there is one."""
    # An output without a detection has nothing to compare.
    differences = [np.abs(one - other).max() for one, other in zip(expected, actual, strict=True) if one.size]
    return float(np.max(differences, initial=0.0))
