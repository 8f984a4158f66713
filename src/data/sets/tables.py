"""Tables of numbers: `train.csv`, `test.csv`, optionally `val.csv`; or one file for all splits; any table format."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from src.configuration.schema import SplitSeed, TestFraction, ValFraction
from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF
from src.data.kinds.table import parse
from src.data.packed import SPLITS, Packed, duplicates, stratified_holdout
from src.data.table_archives import is_table, read_members


class Tables:
    """Reads the table files of a folder or an archive; every column is standardised by its training part.

    A constant column becomes zeros.
    """

    kind = "table"
    archive_name = "table.tar.gz"
    sample: ClassVar[str] = "src.data.samples.curves"

    def __init__(
        self,
        *,
        val_fraction: ValFraction = 0.1,
        test_fraction: TestFraction = 0.2,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses the archive.

        Raises:
            SourceError: a file can't be parsed, two files are the same split, columns differ, or a split is missing.
        """
        tables: dict[str, np.ndarray] = {}
        columns: list[str] | None = None
        unused = {"of another kind": 0}
        for name, content in read_members(archive):
            path = PurePosixPath(name)
            if not is_table(name):
                unused["of another kind"] += 1
                continue
            split = SPLIT_OF.get(path.stem, "")
            if split in tables:
                raise SourceError(f"{archive}: {name} is the second table of its split: give one file a split")
            header, tables[split] = parse(content, f"{archive}: {name}")
            if columns is not None and header != columns:
                raise SourceError(f"{archive}: {name} has other columns than the file before it: give all the same")
            columns = header
        if set(tables) == {""}:
            rest, test = stratified_holdout(np.zeros(len(tables[""])), self.test_fraction, self.split_seed)
            tables = {"train": tables[""][rest], "test": tables[""][test]}
        if "" in tables or not {"train", "test"} <= set(tables):
            raise SourceError(f"{archive}: no train.csv and test.csv in it, nor one table file alone")
        if "val" not in tables:
            keep, held = stratified_holdout(np.zeros(len(tables["train"])), self.val_fraction, self.split_seed)
            tables |= {"train": tables["train"][keep], "val": tables["train"][held]}
        mean, std = tables["train"].mean(0, np.float64), tables["train"].std(0, np.float64)
        std[std == 0] = 1
        meta = {
            "kind": self.kind,
            "shape": [len(mean)],
            "columns": columns,
            "mean": mean.astype(np.float32).tolist(),
            "std": std.astype(np.float32).tolist(),
            "duplicates": duplicates({split: [row.tobytes() for row in tables[split]] for split in SPLITS}),
        }
        splits = {split: {"rows": ((tables[split] - mean) / std).astype(np.float32)} for split in SPLITS}
        return Packed(splits, meta, {reason: count for reason, count in unused.items() if count})
