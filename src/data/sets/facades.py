"""Pairs of images side by side, pix2pix's layout: `{train,val,test}/*.jpg`, the left half A, the right half B."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from src.configuration.schema import Colour, PositiveInt, SplitSeed, ValFraction
from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError
from src.data.folders import list_folders
from src.data.image_files import SUFFIXES, WHITE, ImageError, fitted, open_image
from src.data.image_rows import Facts, ImageRows
from src.data.packed import SPLITS, Packed


class PairedImages:
    """Reads a folder or an archive of pairs; each half is brought to `size` x `size`.

    `val` is taken from the archive, or drawn from `train` if the archive has none. With `palette`, the label maps (the
    input side) have these colours, from which evaluate reads labels off generated pictures.
    """

    kind = "pairs"
    archive_name = "facades.tar.gz"
    sample: ClassVar[str] = "src.data.samples.facades"

    def __init__(
        self,
        *,
        direction: Literal["AtoB", "BtoA"] = "AtoB",
        size: PositiveInt = 256,
        palette: Literal["facades"] | None = None,
        background: Colour = "white",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.direction = direction
        self.size = size
        self.palette = palette
        self.background = background
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and decodes the archive.

        Raises:
            SourceError: a split is missing, an image can't be decoded, or is not two squares side by side.
        """
        return self._packed(Archive(archive), frozenset())

    def _packed(self, archive: Archive, skipped: frozenset[str]) -> Packed:
        pairs, unused = list_pairs(archive, self.val_fraction, self.split_seed, skipped)
        decode = Halves(self.size, self.background)
        source, target = (0, 1) if self.direction == "AtoB" else (1, 0)
        splits = {}
        for split in SPLITS:
            rows = ImageRows(archive, pairs[split], decode, (2, 3, self.size, self.size))
            splits[split] = {"input": rows.part(source), "target": rows.part(target)}
        meta = {
            "kind": self.kind,
            "shape": [3, self.size, self.size],
            "direction": self.direction,
            "palette": self.palette,
        }
        if self.background != WHITE:  # what a signature without a background means
            meta["background"] = self.background
        return Packed(splits, meta, unused)


def list_pairs(
    archive: Archive, val_fraction: float, split_seed: int, skipped: Collection[str] = ()
) -> tuple[dict[str, list[str]], Counter[str]]:
    """The files of each split in the order of their rows, and the number of files without use, by reason.

    Raises:
        SourceError: a split is missing.
    """
    folders = list_folders(archive, SUFFIXES, has_classes=False, skipped=skipped)
    pairs = {split: sorted((one.name for one in folders.examples[split]), key=_natural) for split in SPLITS}
    for split in ("train", "test"):
        if not pairs[split]:
            raise SourceError(
                f"{archive.path}: no {split}/*.jpg in it: pairs go into train/, test/ and optionally val/"
            )
    if not pairs["val"]:
        if len(pairs["train"]) < 2:
            raise SourceError(f"{archive.path}: train/ has one pair and val/ none: give at least two, val takes one")
        order = np.random.default_rng(split_seed).permutation(len(pairs["train"]))
        held_out = set(order[: max(1, round(val_fraction * len(order)))].tolist())
        pairs["val"] = [pair for i, pair in enumerate(pairs["train"]) if i in held_out]
        pairs["train"] = [pair for i, pair in enumerate(pairs["train"]) if i not in held_out]
    return pairs, folders.unused


@dataclass(frozen=True)
class Halves:
    """Decodes a file of two squares side by side to A and B, uint8 [2, 3, size, size]."""

    size: int
    background: str = WHITE

    def __call__(self, files: Sequence[tuple[bytes, str]]) -> tuple[np.ndarray, Facts]:
        ((content, name),) = files
        picture, mode = open_image(content, name, background=self.background)
        width, height = picture.size
        if width != 2 * height:
            raise ImageError(name, f"is {width}x{height}", "a pair is two squares side by side, twice as wide as high")
        # Resized separately: together they would blend where they meet.
        halves = [picture.crop((left, 0, left + height, height)) for left in (0, height)]
        pixels = np.stack([fitted(half, self.size, self.size) for half in halves])
        return pixels, Facts(width, height, mode, len(content))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.replace(".", "/").split("/")]
