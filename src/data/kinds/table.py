"""Tables of numbers: `rows` fp32 [N, D], standardised by the training part."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.common.errors import Failure
from src.configuration.schema import Loader
from src.data.batching import RowBatches
from src.data.kinds import Feed, Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batch

SUFFIXES = (".csv", ".tsv")


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
        """The first row of a CSV or TSV file as `rows` fp32 [1, D]."""
        if source is None:
            raise Failure(f"no input: {signature['name']} wants a table, a CSV or TSV file")
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise Failure(f"{source} can't be read ({error.strerror}): name a CSV or TSV file") from None
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
    """The columns' names and the rows, fp32 [N, D], of a CSV or TSV file with or without a header.

    Without a header the columns are numbered from 0.

    Raises:
        Failure: the file is empty, a row has another length, or a cell is no finite number.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    lines = [
        (number, cells) for number, cells in enumerate(csv.reader(io.StringIO(text), delimiter=delimiter), 1) if cells
    ]
    if not lines:
        raise Failure(f"{name} holds no row: give lines of numbers, separated by commas or tabs")
    first = [cell.strip() for cell in lines[0][1]]
    has_header = not all(_is_number(cell) for cell in first)
    columns = first if has_header else [str(number) for number in range(len(first))]
    rows = np.empty((len(lines) - has_header, len(columns)), np.float32)
    for row, (number, cells) in zip(rows, lines[int(has_header) :], strict=True):
        if len(cells) != len(columns):
            raise Failure(f"{name}, line {number}: {len(cells)} cells where the first line has {len(columns)}")
        for column, (label, cell) in enumerate(zip(columns, cells, strict=True)):
            if not _is_number(cell):
                raise Failure(
                    f"{name}, line {number}, column {label}: {cell!r} is no finite number: correct or remove it"
                )
            row[column] = float(cell)
    return columns, rows


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(np.float32(cell)))
    except ValueError:
        return False


KIND = Table()
