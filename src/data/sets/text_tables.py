"""Tables of texts: CSV, TSV, JSON lines or Parquet with a column of texts and one of classes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from src.configuration.schema import (
    Encoding,
    OnBad,
    PositiveInt,
    SplitSeed,
    TableColumns,
    TestFraction,
    TextColumns,
    TextTokenizer,
    ValFraction,
)
from src.data.fetching.files import SourceError
from src.data.packed import SPLITS
from src.data.sets.texts import Examples, Texts, fault_of
from src.data.splitting import split_name
from src.data.table_archives import is_table, read_members, split_of
from src.data.table_files import SUFFIXES, Table, cell_text, read_table
from src.data.tokens import CHUNK


class TextTables(Texts):
    """Reads the table files of a folder or an archive, or a single one.

    A file's name tells its split (`train.csv`, `test-00000-of-00002.parquet`), if one is train's; several may make up a
    split. Or a column does, or none: then `test_fraction` and `val_fraction` of each class are drawn.
    """

    archive_name = "table.tar"

    def __init__(
        self,
        *,
        columns: TableColumns = None,
        vocabulary: PositiveInt = 25000,
        tokenizer: TextTokenizer = None,
        encoding: Encoding = None,
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.1,
        test_fraction: TestFraction = 0.2,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.columns = columns or TextColumns()
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def examples(self, archive: Path) -> Examples:
        parts, unused = self._parts(archive)
        examples = Examples(
            texts=lambda: (chunk for part in parts for chunk in part.texts()),
            groups=None if self.columns.group is None else [],
            unused=unused,
        )
        for part in parts:
            self._add(part, examples)
        examples.lines = [line for part in parts for line in part.lines()]
        return examples

    def _parts(self, archive: Path) -> tuple[list[_Part], Counter[str]]:
        """The tables of the archive, and how many files are not used, by reason."""
        parts, unused = [], Counter[str]()
        for name, content in read_members(archive):
            if not is_table(name):
                unused["of another kind"] += 1
                continue
            table = read_table(
                content, f"{archive}: {name}", encoding=self.encoding, has_header=self.columns.has_header
            )
            parts.append(_Part(name, table, split_of(name), self.columns.texts))
        has_splits = any(part.split == "train" for part in parts)
        if self.columns.split is None and has_splits:
            unused["named after no split"] += sum(not part.split for part in parts)
            parts = [part for part in parts if part.split]
        elif not has_splits:
            parts = [replace(part, split="") for part in parts]
        if not parts:
            raise SourceError(f"{archive}: no table in it: give files that end in {', '.join(SUFFIXES)}")
        return sorted(parts, key=lambda part: (*SPLITS, "").index(part.split)), +unused

    def _add(self, part: _Part, examples: Examples) -> None:
        """Adds the rows of a table that can be used."""
        table, columns = part.table, self.columns
        labels = [cell_text(value) for value in table.column(str(columns.label))]
        splits = [part.split] * table.rows if columns.split is None else table.column(str(columns.split))
        groups = None if columns.group is None else table.column(str(columns.group))
        for row, text in enumerate(text for chunk in part.all_texts() for text in chunk):
            fault = fault_of(text) if labels[row] else "has no label"
            if fault and self.on_bad == "refuse":
                raise SourceError(f"{table.place(row)} {fault}: correct or remove it, or give on_bad: skip")
            if fault:
                examples.bad.append((f"{part.name}:{table.line(row)}", fault))
                part.bad.add(row)
                continue
            examples.names.append(part.name)
            examples.labels.append(labels[row])
            examples.splits.append(_split(splits[row], table, row))
            if examples.groups is not None and groups is not None:
                examples.groups.append(groups[row])


@dataclass
class _Part:
    """A table, its split by the name of its file, and the rows that are left out."""

    name: str
    table: Table
    split: str
    columns: list[str]
    bad: set[int] = field(default_factory=set)

    def all_texts(self) -> Iterator[list[Any]]:
        """The texts of all rows in chunks; a value that is no text stands as it is."""
        for parts in zip(*(self.table.chunks(column, CHUNK) for column in self.columns), strict=True):
            yield parts[0] if len(parts) == 1 else [_joined(values) for values in zip(*parts, strict=True)]

    def lines(self) -> Iterator[int]:
        """The numbers of the lines, or rows, that are used."""
        return (self.table.line(row) for row in range(self.table.rows) if row not in self.bad)

    def texts(self) -> Iterator[list[str]]:
        """The texts that are used, in chunks."""
        for start, texts in zip(itertools.count(0, CHUNK), self.all_texts()):
            if used := [text for row, text in enumerate(texts, start) if row not in self.bad]:
                yield used


def _joined(values: Sequence[Any]) -> Any:
    """The columns of a row as one text; the first that holds something else is the row's fault."""
    return next((value for value in values if not isinstance(value, str | None)), None) or " ".join(
        filter(None, values)
    )


def _split(value: Any, table: Table, row: int) -> str:
    try:
        return split_name(value)
    except SourceError as error:
        raise SourceError(f"{table.place(row)}: {error}") from None
