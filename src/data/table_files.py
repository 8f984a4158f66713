"""Reads table files: CSV, TSV, JSON lines and Parquet, in one way for texts, manifests and numbers. No torch."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from src.data.fetching.files import SourceError
from src.data.text_files import codec_of, refuse_zero_bytes, undecodable

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_CHUNK = 10_000  # rows of a CSV file that are Python objects at a time
_BLOCK = 1 << 20  # bytes that are decoded at a time
_HEAD = 1 << 16  # characters from which the delimiter is recognised


@dataclass(frozen=True)
class Table:
    """The columns of a table file, all of the same length.

    A value is as in the file: of CSV and TSV always a str, of JSON lines and Parquet whatever they hold. A key that a
    JSON line lacks is None.
    """

    name: str  # of the file, for messages
    values: Mapping[str, list[Any] | pa.ChunkedArray]  # arrow's, since a Python str costs 50 bytes besides its text
    lines: Sequence[int] | None = None  # the line on which each row begins, counted from 1; None: the format has none

    @property
    def columns(self) -> list[str]:
        return list(self.values)

    @property
    def rows(self) -> int:
        return len(next(iter(self.values.values())))

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
            SourceError: there is no such column.
        """
        return [value for chunk in self.chunks(name, max(1, self.rows)) for value in chunk]

    def chunks(self, name: str, size: int) -> Iterator[list[Any]]:
        """The values of a column in lists of `size`; the last may be shorter.

        Raises:
            SourceError: there is no such column.
        """
        if name not in self.values:
            raise SourceError(f"{self.name} has no column {name!r}: it has {', '.join(map(repr, self.columns))}")
        values = self.values[name]
        for start in range(0, self.rows, size):
            part = values[start : start + size]
            yield part if isinstance(part, list) else part.to_pylist()

    def line(self, row: int) -> int:
        """The line on which a row begins, or its number where the format has no lines, from 1; `row` counts from 0."""
        return row + 1 if self.lines is None else int(self.lines[row])

    def place(self, row: int) -> str:
        """Where a row stands in the file, for messages; `row` counts from 0."""
        return f"{self.name}, {'row' if self.lines is None else 'line'} {self.line(row)}"


def read_table(content: bytes, name: str, *, encoding: str | None = None, has_header: bool | None = True) -> Table:
    """Parses a table file; the suffix of `name` tells its format, CSV if it is none of `SUFFIXES`.

    Args:
        encoding: of CSV, TSV and JSON lines, a name that Python knows; None: UTF-8, or what a byte-order mark says.
        has_header: whether the first row of CSV or TSV names the columns, which are numbered from "0" otherwise; None:
            it does unless all of its cells are numbers.

    Raises:
        SourceError: the file is empty or damaged, has another encoding, a row has another length than the first, or two
            columns have one name.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".parquet":
        return _parquet(content, name)
    text = _decoded(content, name, encoding)
    if suffix == ".jsonl":
        return _json_lines(text, name)
    delimiter = _delimiter(text, "\t,;" if suffix == ".tsv" else ",\t;")
    try:
        return _csv(text, name, has_header, delimiter=delimiter, strict=True)
    except SourceError:
        # Many TSV files hold quotation marks as they are: a cell may begin with one that nothing closes.
        if delimiter != "\t" or b'"' not in content:
            raise
    return _csv(text, name, has_header, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _decoded(content: bytes, name: str, encoding: str | None) -> io.TextIOWrapper:
    """The text of a file, decoded as it is read.

    Raises:
        SourceError: it is empty, or has another encoding; the message names the first byte that does not fit.
    """
    if not content.strip():
        raise SourceError(f"{name} holds no row: it is empty")
    codec = codec_of(content, encoding)
    view = memoryview(content)
    try:
        for _ in codecs.iterdecode((bytes(view[i : i + _BLOCK]) for i in range(0, len(view), _BLOCK)), codec):
            pass
    except UnicodeError:
        raise undecodable(content, name, encoding) from None
    refuse_zero_bytes(content, name, codec)
    return io.TextIOWrapper(io.BytesIO(content), codec, newline="")


def _delimiter(text: io.TextIOWrapper, candidates: str) -> str:
    """What separates the cells: the first that gives the first rows the same number of cells, at least two."""
    head = text.read(_HEAD)
    text.seek(0)
    widths = {}
    for delimiter in candidates:
        rows = [
            row for row in itertools.islice(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter), 6) if row
        ]
        rows = rows[:-1] if len(head) == _HEAD and len(rows) > 1 else rows  # the last may be cut
        widths[delimiter] = [len(row) for row in rows]
    for delimiter, width in widths.items():
        if len(set(width)) == 1 and width[0] > 1:
            return delimiter
    return max(widths, key=lambda delimiter: widths[delimiter][:1])


def _csv(text: io.TextIOWrapper, name: str, has_header: bool | None, **dialect: Any) -> Table:
    import pyarrow as pa

    text.seek(0)
    csv.field_size_limit(1 << 30)  # bytes of a cell; 131,072 is the library's
    reader = csv.reader(text, **dialect)
    chunks: list[list[pa.Array]] = []
    lines: list[np.ndarray] = []
    columns: list[str] = []
    records = _records(reader, name)
    line, first = next(records, (0, []))
    if not first:
        raise SourceError(f"{name} holds no row: give lines of cells, separated by commas or tabs")
    if has_header is None:
        has_header = not all(is_number(cell) for cell in first)
    columns = [cell.strip() for cell in first] if has_header else [str(number) for number in range(len(first))]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise SourceError(f"{name} has two columns of the name {twice[0]!r}: rename one")
    records = records if has_header else itertools.chain([(line, first)], records)
    while rows := list(itertools.islice(records, _CHUNK)):
        for line, cells in rows:
            if len(cells) != len(columns):
                raise SourceError(f"{name}, line {line}: {len(cells)} cells where the first line has {len(columns)}")
        lines.append(np.array([line for line, _ in rows], np.int64))
        chunks.append([pa.array(cells, pa.large_string()) for cells in zip(*(cells for _, cells in rows), strict=True)])
    if not chunks:
        raise SourceError(f"{name} holds no row beside its first line, which names the columns")
    values = {column: pa.chunked_array([chunk[i] for chunk in chunks]) for i, column in enumerate(columns)}
    return Table(name, values, np.concatenate(lines))  # type: ignore[arg-type]  # an array of integers


def _records(reader: Any, name: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line on which it begins."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise SourceError(
                f"{name}, line {line}: {error}: quote a cell that holds quotation marks, and double those within it"
            ) from None
        if cells:
            yield line, cells


def cell_text(value: Any) -> str:
    """A cell as text, "" for none; 1.0 is 1, as pandas writes integers beside missing ones."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def is_number(cell: Any) -> bool:
    """Whether a cell is a finite number of 32 bits, or the text of one."""
    try:
        return bool(np.isfinite(np.float32(cell)))
    except (ValueError, TypeError):
        return False


def _json_lines(text: io.TextIOWrapper, name: str) -> Table:
    values: dict[str, list[Any]] = {}
    lines: list[int] = []
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}, line {number} is no JSON ({error}): give one object a line") from None
        if not isinstance(entry, dict):
            raise SourceError(f'{name}, line {number} is no object: give lines such as {{"text": ..., "label": ...}}')
        values |= {key: [None] * len(lines) for key in entry if key not in values}
        for key, column in values.items():
            column.append(entry.get(key))
        lines.append(number)
    if not values:
        raise SourceError(f"{name} holds no row: give one object a line")
    return Table(name, values, lines)


def _parquet(content: bytes, name: str) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise SourceError(f"{name} is damaged or no Parquet file ({reason}): write it again") from None
    if not (table.num_rows and table.num_columns):
        raise SourceError(f"{name} holds no row")
    if twice := sorted({column for column in table.column_names if table.column_names.count(column) > 1}):
        raise SourceError(f"{name} has two columns of the name {twice[0]!r}: rename one")
    return Table(name, dict(zip(table.column_names, table.columns, strict=True)))
