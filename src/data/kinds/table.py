"""Tables of numbers: `rows` fp32 [N, D], standardised by the training part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.common.errors import Failure
from src.configuration.schema import Loader
from src.data.batching import RowBatches
from src.data.fetching.files import SourceError
from src.data.kinds import Feed, Inputs
from src.data.table_files import SUFFIXES, is_number, read_table

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batch


class TableLoader(Loader):
    """Batches of rows."""


class TableBatches(RowBatches):
    """(rows fp32 [B, D],)."""

    rows = ("rows",)

    def assemble(self, source: Mapping[str, Tensor], at: Tensor, indices: Tensor, index: int) -> Batch:
        rows = source["rows"]
        return (rows[at.to(rows.device, non_blocking=True)],)


class Table:
    """The kind of tables: an example is a row of D numbers, in standard deviations from the training rows' means."""

    options = TableLoader
    batches = TableBatches
    inputs = Inputs(("rows",), ({0: "batch"},))
    suffixes = SUFFIXES
    example_argument = "rows.csv"
    hub_prefix = "tabular"

    def count(self, arrays: Mapping[str, Any]) -> int:
        return len(arrays["rows"])

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """The first row of a table file as `rows` fp32 [1, D]."""
        if source is None:
            raise Failure(f"no input: {signature['name']} wants a table, e.g. a CSV file")
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise Failure(
                f"{source} can't be read ({error.strerror}): name a CSV, TSV, JSON lines or Parquet file"
            ) from None
        columns, rows = parse(content, source)
        if columns != signature["columns"]:
            raise Failure(f"{source}: its columns are not those of the model: {', '.join(signature['columns'])}")
        mean, std = (np.array(signature[key], np.float32) for key in ("mean", "std"))
        return {"rows": (rows[:1] - mean) / std}

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> list[str]:
        """Rows in their own units, a text each."""
        mean, std = (np.array(meta[key], np.float32) for key in ("mean", "std"))
        return [", ".join(f"{value:g}" for value in split["rows"][i].cpu().numpy() * std + mean) for i in indices]

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        return {key: meta[key] for key in ("columns", "mean", "std")}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return f"""\
mean, std = np.array({signature["mean"]}, np.float32), np.array({signature["std"]}, np.float32)
rows = (np.genfromtxt("rows.csv", np.float32, delimiter=",", skip_header=1, ndmin=2) - mean) / std
"""


def parse(content: bytes, name: str) -> tuple[list[str], np.ndarray]:
    """The columns' names and the rows, fp32 [N, D], of a table file; CSV and TSV with or without a header.

    Without a header the columns are numbered from 0.

    Raises:
        SourceError: the file can't be read as a table, or a cell is no finite number.
    """
    table = read_table(content, name, has_header=None)
    rows = np.empty((table.rows, len(table.columns)), np.float32)
    for number, column in enumerate(table.columns):
        cells = table.column(column)
        try:
            with np.errstate(over="ignore"):
                rows[:, number] = [float(cell) for cell in cells]
        except (ValueError, TypeError, OverflowError):
            faults = [not is_number(cell) for cell in cells]
        else:
            faults = (~np.isfinite(rows[:, number])).tolist()
        if any(faults):
            row = faults.index(True)
            raise SourceError(
                f"{table.place(row)}, column {column}: {cells[row]!r} is no finite number: correct or remove it"
            )
    return table.columns, rows


KIND = Table()
