"""Tables of numbers: each column is a feature, in its own unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.describing import MEMBERS, Examined, chosen
from src.describing.digests import digest
from src.describing.stored import StoredSplit


class Table:
    """How tables are measured and shown."""

    noun = counted = "rows"
    label, has_one_class = "", False
    fitted: tuple[str, ...] = ()
    titles: Mapping[str, str] = {}

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        mean, std = (np.array(meta[key], np.float32) for key in ("mean", "std"))
        pieces = [(piece * std + mean, digest(piece)) for piece in split["rows"].pieces()]
        columns = np.concatenate([piece[0] for piece in pieces]).T
        return Examined(
            digests=np.concatenate([piece[1] for piece in pieces]),
            numbers=dict(zip(meta["columns"], columns, strict=True)),
            members={"": chosen(columns.shape[1], MEMBERS)},
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        mean, std = (np.array(meta[key], np.float32) for key in ("mean", "std"))
        values = split["rows"][np.asarray(rows, np.int64)] * std + mean
        return [", ".join(f"{value:g}" for value in row) for row in values]

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        constant = [name for name, values in splits["train"].numbers.items() if values.min() == values.max()]
        if not constant:
            return []
        return [f"{len(constant)} columns have one value in train ({', '.join(constant[:3])}); remove them"]


DESCRIPTION = Table()
