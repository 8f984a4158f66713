"""Writes packed splits: arrays as they are, and rows of images as they are decoded."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from src.common.files import replacing_path, write_text_atomically
from src.configuration.declarations import load_kind
from src.configuration.schema import PackingRay
from src.data.fetching.files import SourceError
from src.data.image_files import ImageError
from src.data.image_rows import ImageRows, Streamed, Summary, write_rows
from src.data.packed import DIGEST_BYTES, Packed, PackedError, Split, equal_digests, mean_and_std
from src.data.rows_on_ray import write_rows_on_ray
from src.data.tensor_file import TensorFile

FACTS = "facts.parquet"


def write_packed(
    packed: Packed,
    folder: Path,
    *,
    config: Mapping[str, Any],
    source: Mapping[str, Any],
    ray: PackingRay | None = None,
) -> dict[str, Any]:
    """Writes the splits, `meta.json`, `origin.json` and `facts.parquet` into `folder`; returns both JSON files as one.

    `config` is how they were packed, `source` where the archive came from: a reader compares them with what it needs.
    What only decoded pixels tell (duplicates, mean and std) is added to the meta. The splits are replaced when all are
    complete. Where files may be skipped, all is packed again without those that can't be decoded. With `ray` they are
    decoded on a cluster.

    Raises:
        PackedError: a split has no example.
        SourceError: a file can't be decoded, or the archive is damaged.
    """
    bad: dict[str, str] = {}
    while True:
        counts = {split: load_kind(packed.meta["kind"]).count(arrays) for split, arrays in packed.splits.items()}
        if empty := [split for split, count in counts.items() if not count]:
            where = f"{source['origin']}: {empty[0]}"
            raise PackedError(f"{where} has no example: val is drawn from classes of two or more")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            digests, notes = _write_splits(packed.splits, folder, ray, can_skip=packed.without is not None)
            break
        except _Unusable as unusable:
            assert packed.without is not None
            bad |= unusable.reasons
            packed = packed.without(frozenset(bad))
    files = {split: {"sha256": digest, "examples": counts[split]} for split, digest in digests.items()}
    meta = _statistics(notes) | packed.meta | {"splits": files}
    origin: dict[str, Any] = {"config": dict(config), "source": dict(source)}
    if packed.unused:
        origin["unused"] = dict(packed.unused)
    if left_out := [*packed.bad, *sorted(bad.items())]:
        origin["bad"] = [list(entry) for entry in left_out]
    _write_facts(folder / FACTS, packed.facts, notes)
    for name, content in (("meta.json", meta), ("origin.json", origin)):
        write_text_atomically(folder / name, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return meta | origin


class _Unusable(Exception):
    """Files that were found to be unusable, and may be skipped: the reasons by name."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(f"{len(reasons)} files")
        self.reasons = reasons


@dataclass
class _Notes:
    """What was noted of the rows of one source, in their order."""

    rows: ImageRows
    key: str  # the first array that the rows belong to
    digests: bytearray = field(default_factory=bytearray)
    width: array[int] = field(default_factory=lambda: array("i"))
    height: array[int] = field(default_factory=lambda: array("i"))
    mode: list[str] = field(default_factory=list)
    bytes: array[int] = field(default_factory=lambda: array("q"))
    values: np.ndarray | None = None  # int64 [C, 256]
    bad: list[ImageError] = field(default_factory=list)

    def add(self, summary: Summary) -> None:
        """Adds the rows that follow."""
        for digest in summary.digests:
            self.digests += digest
        for facts in summary.facts:
            self.width.append(facts.width)
            self.height.append(facts.height)
            self.mode.append(facts.mode)
            self.bytes.append(facts.bytes)
        if summary.values is not None:
            self.values = summary.values + (0 if self.values is None else self.values)
        self.bad += summary.bad


def _write_splits(
    splits: Mapping[str, Split], folder: Path, ray: PackingRay | None, *, can_skip: bool
) -> tuple[dict[str, str], dict[str, list[_Notes]]]:
    """Writes all splits; returns each one's sha256, and what was noted of its streamed rows.

    Raises:
        _Unusable: files can't be decoded, and `can_skip`; no split was replaced.
    """
    digests: dict[str, str] = {}
    notes: dict[str, list[_Notes]] = {}
    with ExitStack() as stack:
        for split, arrays in splits.items():
            temporary = stack.enter_context(replacing_path(folder / f"{split}.safetensors"))
            digests[split], notes[split] = _write_split(arrays, temporary, ray, can_skip)
        bad = [error for sources in notes.values() for source in sources for error in source.bad]
        if bad:
            raise _Unusable({error.name: error.reason for error in bad})
    return digests, notes


def _write_split(arrays: Split, path: Path, ray: PackingRay | None, can_skip: bool) -> tuple[str, list[_Notes]]:
    sources: dict[int, list[tuple[str, Streamed]]] = defaultdict(list)  # the arrays made of the same rows
    notes = []
    with TensorFile(path, {key: (value.shape, value.dtype) for key, value in arrays.items()}) as file:
        for key in file.offsets:
            value = arrays[key]
            if isinstance(value, Streamed):
                sources[id(value.rows)].append((key, value))
            else:
                file.write(file.offsets[key], np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        for parts in sources.values():
            rows = parts[0][1].rows
            row_notes = _Notes(rows, parts[0][0])
            offsets = {value.index: file.offsets[key] for key, value in parts}
            ranges = write_rows_on_ray(rows, path, offsets, ray) if ray else write_rows(rows, path, offsets)
            for start, stop, summary in ranges:
                for offset in offsets.values() if ray is None else ():
                    file.hash_written(offset + start * rows.part_bytes, offset + stop * rows.part_bytes)
                if summary.bad and not can_skip:
                    raise SourceError(f"{rows.archive.path}: {summary.bad[0]}")
                row_notes.add(summary)
            notes.append(row_notes)
        return file.sha256(), notes


def _statistics(notes: Mapping[str, Sequence[_Notes]]) -> dict[str, Any]:
    """Duplicates of all splits with streamed rows; mean and standard deviation of the training part's values."""
    meta: dict[str, Any] = {}
    if any(notes.values()):
        digests = {split: b"".join(source.digests for source in sources) for split, sources in notes.items()}
        meta["duplicates"] = equal_digests({k: np.frombuffer(v, f"S{DIGEST_BYTES}") for k, v in digests.items()})
    for source in notes.get("train", ()):
        if source.values is not None:
            meta |= mean_and_std(source.values)
    return meta


def _write_facts(
    path: Path, facts: Mapping[str, Mapping[str, Sequence[Any]]], notes: Mapping[str, Sequence[_Notes]]
) -> None:
    """Writes what is known of each example: `split`, `array`, `row`, and the columns of `facts` or of streamed rows.

    Without any of them there is no file.
    """
    tables = [(split, "", dict(columns)) for split, columns in facts.items()]
    for split, sources in notes.items():
        for source in sources:
            names = source.rows.names[:: source.rows.files_per_row]
            columns = {key: getattr(source, key) for key in ("width", "height", "mode", "bytes")}
            tables.append((split, source.key, {"name": names, **columns}))
    if not tables:
        path.unlink(missing_ok=True)
        return
    import pyarrow
    from pyarrow import parquet

    parts = []
    for split, key, columns in tables:
        count = len(next(iter(columns.values()), ()))
        parts.append(
            pyarrow.table(
                {
                    "split": pyarrow.DictionaryArray.from_arrays(np.zeros(count, np.int8), [split]),
                    "array": pyarrow.DictionaryArray.from_arrays(np.zeros(count, np.int8), [key]),
                    "row": np.arange(count),
                    **{name: np.asarray(v) if isinstance(v, array) else v for name, v in columns.items()},
                }
            )
        )
    with replacing_path(path) as temporary:
        parquet.write_table(pyarrow.concat_tables(parts, promote_options="default"), temporary)
