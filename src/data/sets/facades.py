"""Pairs of images side by side, pix2pix's layout: `{train,val,test}/*.jpg`, the left half A, the right half B."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from src.configuration.schema import Colour, PositiveInt, SplitSeed, ValFraction
from src.data.fetching.files import SourceError
from src.data.folders import read_folders
from src.data.image_files import SUFFIXES, WHITE, decode, resized
from src.data.packed import SPLITS, Packed, duplicates


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
        folders = read_folders(archive, self._halves, SUFFIXES, has_classes=False)
        pairs = {
            split: [example.content for example in sorted(folders.examples[split], key=lambda e: _natural(e.name))]
            for split in SPLITS
        }
        for split in ("train", "test"):
            if not pairs[split]:
                raise SourceError(f"{archive}: no {split}/*.jpg in it: pairs go into train/, test/ and optionally val/")
        if not pairs["val"]:
            if len(pairs["train"]) < 2:
                raise SourceError(f"{archive}: train/ has one pair and val/ none: give at least two, val takes one")
            order = np.random.default_rng(self.split_seed).permutation(len(pairs["train"]))
            held_out = set(order[: max(1, round(self.val_fraction * len(order)))].tolist())
            pairs["val"] = [pair for i, pair in enumerate(pairs["train"]) if i in held_out]
            pairs["train"] = [pair for i, pair in enumerate(pairs["train"]) if i not in held_out]
        arrays = {split: np.stack(pairs[split]) for split in SPLITS}  # [N, 2, 3, S, S]
        source, target = (0, 1) if self.direction == "AtoB" else (1, 0)
        meta = {
            "kind": self.kind,
            "shape": [3, self.size, self.size],
            "direction": self.direction,
            "palette": self.palette,
            "duplicates": duplicates({k: [pair.tobytes() for pair in v] for k, v in arrays.items()}),
        }
        if self.background != WHITE:  # what a signature without a background means
            meta["background"] = self.background
        splits = {k: {"input": v[:, source], "target": v[:, target]} for k, v in arrays.items()}
        return Packed(splits, meta, folders.unused)

    def _halves(self, content: bytes, name: str) -> np.ndarray:
        """A and B as uint8 [2, 3, S, S]."""
        pair = decode(content, name, background=self.background)
        height, width, _ = pair.shape
        if width != 2 * height:
            raise SourceError(f"{name} is {width}x{height}: a pair is two squares side by side, twice as wide as high")
        # Resized separately: together they would blend where they meet.
        halves = [resized(half, self.size, self.size) for half in (pair[:, :height], pair[:, height:])]
        return np.stack(halves).transpose(0, 3, 1, 2)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.replace(".", "/").split("/")]
