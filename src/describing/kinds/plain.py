"""Any kind of data without a file of its own here: examples are counted, and equal ones found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.data import kinds
from src.describing import Examined
from src.describing.digests import digest
from src.describing.stored import StoredSplit


class Plain:
    """How examples of an unknown kind are measured: those whose rows are equal in all arrays are duplicates."""

    noun = counted = "examples"
    label, has_one_class = "", False
    fitted: tuple[str, ...] = ()
    titles: Mapping[str, str] = {}

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        count = kinds.load(meta["kind"]).count(split)
        columns = [
            np.concatenate([digest(piece) for piece in array.pieces()])
            for _, array in sorted(split.items())
            if len(array) == count
        ]
        # Of arrays without a row for each example nothing is known.
        return Examined(
            digests=digest(np.stack(columns, 1)) if columns else np.arange(count, dtype=np.uint64), numbers={}
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        return []

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        return []


DESCRIPTION = Plain()
