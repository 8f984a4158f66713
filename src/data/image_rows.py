"""Rows of a split that are decoded while its file is written: on all cores, a few files in memory at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from src.common.hardware import cores
from src.common.ordered import in_order
from src.configuration.schema import Fit
from src.data.fetching.archives import Archive
from src.data.image_files import WHITE, ImageError, fitted, open_image
from src.data.packed import DIGEST_BYTES, SPLITS, Packed, stratified_holdout
from src.data.tensor_file import write_at

RANGE_BYTES = 2 << 20  # of pixels that one task decodes


class Facts(NamedTuple):
    """What is told of an image file: pixels as it is seen, Pillow's mode and the file's size."""

    width: int
    height: int
    mode: str
    bytes: int


# Makes a row of its files, pairs of content and name: pixels uint8 [parts, C, H, W], and the facts of the first file.
# It raises ImageError where a file can't be used.
Decode = Callable[[Sequence[tuple[bytes, str]]], tuple[np.ndarray, Facts]]


@dataclass(frozen=True)
class FittedImage:
    """Decodes one file to one image of `shape`, [C, H, W]."""

    shape: tuple[int, int, int]
    fit: Fit = "stretch"
    background: str = WHITE

    def __call__(self, files: Sequence[tuple[bytes, str]]) -> tuple[np.ndarray, Facts]:
        ((content, name),) = files
        channels, height, width = self.shape
        picture, mode = open_image(content, name, channels=channels, background=self.background)
        facts = Facts(*picture.size, mode, len(content))
        return fitted(picture, width, height, self.fit, self.background)[None], facts

    @property
    def meta(self) -> dict[str, Any]:
        """What a caller needs to decode as the model's images were: `shape`, and what is not the default."""
        meta: dict[str, Any] = {"shape": list(self.shape)}
        if self.fit != "stretch":
            meta["fit"] = self.fit
        if self.background != WHITE:
            meta["background"] = self.background
        return meta


@dataclass
class Summary:
    """What was noted of consecutive rows."""

    digests: list[bytes] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    values: np.ndarray | None = None  # int64 [C, 256]: how often each value occurs in each channel
    bad: list[ImageError] = field(default_factory=list)  # of the rows that could not be made

    def add(self, other: Summary) -> None:
        """Adds what was noted of the rows that follow."""
        self.digests += other.digests
        self.facts += other.facts
        self.bad += other.bad
        if other.values is not None:
            self.values = other.values + (0 if self.values is None else self.values)


@dataclass(frozen=True)
class ImageRows:
    """Rows uint8 [N, parts, C, H, W], decoded from the files of an archive.

    Args:
        archive: where the files are.
        names: of all files in the order of the rows, `files_per_row` for each.
        decode: makes a row of its files; it is pickled where other machines decode.
        shape: of a row, [parts, C, H, W].
        equal: what is looked at for duplicates, rows or each part of a row.
        counted: whether values are counted, for their mean and standard deviation.
    """

    archive: Archive
    names: Sequence[str]
    decode: Decode
    shape: tuple[int, int, int, int]
    files_per_row: int = 1
    equal: Literal["rows", "parts"] = "rows"
    counted: bool = False

    def __len__(self) -> int:
        return len(self.names) // self.files_per_row

    @property
    def part_bytes(self) -> int:
        """Bytes of one part of a row."""
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape)

    def part(self, index: int = 0) -> Streamed:
        """One part of each row as an array [N, C, H, W]."""
        return Streamed(self, index)

    def files(self, row: int) -> Sequence[str]:
        """The names of a row's files."""
        return self.names[row * self.files_per_row : (row + 1) * self.files_per_row]


class LabelledFiles(NamedTuple):
    """Image files of a split in the order of its rows, and the number of each one's class."""

    names: Sequence[str]
    labels: Sequence[int]


def pack_image_files(
    archive: Archive,
    parts: Mapping[str, LabelledFiles],
    decode: FittedImage,
    *,
    classes: Sequence[str],
    val_fraction: float,
    split_seed: int,
    unused: Mapping[str, int],
    without: Callable[[frozenset[str]], Packed] | None,
) -> Packed:
    """Packs labelled image files as `packed.pack_images` packs images; without `val` it is drawn from `train`."""
    parts = dict(parts)
    if "val" not in parts:
        names, labels = parts["train"]
        keep, held = stratified_holdout(np.array(labels), val_fraction, split_seed)
        for split, rows in (("train", keep.tolist()), ("val", held.tolist())):
            parts[split] = LabelledFiles([names[i] for i in rows], [labels[i] for i in rows])
    splits = {
        split: {
            "images": ImageRows(
                archive, parts[split].names, decode, (1, *decode.shape), counted=split == "train"
            ).part(),
            "labels": np.array(parts[split].labels, np.int64),
        }
        for split in SPLITS
    }
    meta = {"kind": "images", "classes": list(classes), **decode.meta}
    return Packed(splits, meta, unused, without=without)


@dataclass(frozen=True)
class Streamed:
    """Stands for an array of a split that is made while it is written: one part of each of `rows`."""

    rows: ImageRows
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.rows.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.rows)


def write_rows(
    rows: ImageRows, path: Path, offsets: Mapping[int, int], threads: int | None = None
) -> Iterator[tuple[int, int, Summary]]:
    """Decodes all rows, on all cores unless `threads` are given, and writes them to their places in `path`.

    `offsets` gives for each part that is kept where in the file its array begins. Yields first row, end and summary of
    one range after another, in order, each when its bytes are written. A file that can't be used is noted in the
    summary, and its row has any content.

    Raises:
        SourceError: the archive is damaged.
        OSError: the file can't be written.
    """
    threads = threads or cores()
    length = max(1, RANGE_BYTES // rows.row_bytes)
    ranges = [(start, min(start + length, len(rows))) for start in range(0, len(rows), length)]
    descriptor = os.open(path, os.O_WRONLY)
    pool = ThreadPoolExecutor(threads)
    try:
        summaries = in_order(
            lambda part: pool.submit(_write_range, rows, *part, descriptor, offsets), ranges, 2 * threads
        )
        for (start, stop), summary in zip(ranges, summaries, strict=True):
            yield start, stop, summary
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(descriptor)


def _write_range(rows: ImageRows, start: int, stop: int, descriptor: int, offsets: Mapping[int, int]) -> Summary:
    """Decodes rows and writes them to their places."""
    block = np.zeros((stop - start, *rows.shape), np.uint8)
    summary = Summary()
    for row, pixels in enumerate(block, start):
        try:
            pixels[:], facts = rows.decode([(rows.archive.read(name), name) for name in rows.files(row)])
        except ImageError as error:
            summary.bad.append(error)
            continue
        summary.facts.append(facts)
        summary.digests += [_digest(part) for part in ([pixels] if rows.equal == "rows" else pixels)]
    for part, offset in offsets.items():
        content = np.ascontiguousarray(block[:, part])
        write_at(descriptor, offset + start * rows.part_bytes, content.data.cast("B"))
    if rows.counted:
        summary.values = _values(block)
    return summary


def _digest(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(pixels.data).digest()[:DIGEST_BYTES]


def _values(block: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of uint8 [n, parts, C, H, W]: int64 [C, 256]."""
    from PIL import Image

    # Pillow counts bytes in place; numpy's bincount makes integers of 8 bytes of them first.
    channels = block.swapaxes(0, 2).reshape(block.shape[2], -1, block.shape[-1])
    return np.array([Image.fromarray(channel).histogram() for channel in channels], np.int64)
