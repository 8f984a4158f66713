"""Pairs of images side by side, pix2pix's layout: `{train,val,test}/*.jpg`, the left half A, the right half B."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np

from src.configuration.schema import NonNegativeInt, OpenFraction, PositiveInt
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.packed import SPLITS, Packed, duplicates
from src.data.sets.image_folder import SUFFIXES, decode, resized


class PairedImages:
    """Reads a folder or an archive of pairs; each half is brought to `size` x `size`.

    `val` is taken from the archive, or drawn from `train` where the archive has none. With `palette`, the label maps
    (the input side) hold these colours, which lets evaluate read labels back off generated pictures.
    """

    kind = "pairs"
    archive_name = "facades.tar.gz"

    def __init__(
        self,
        *,
        direction: Literal["AtoB", "BtoA"] = "AtoB",
        size: PositiveInt = 256,
        palette: Literal["facades"] | None = None,
        val_fraction: OpenFraction = 0.1,
        split_seed: NonNegativeInt = 0,
    ) -> None:
        self.direction = direction
        self.size = size
        self.palette = palette
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def draw_sample(self, archive: Path) -> None:
        """Writes the embedded sample in the official layout."""
        from src.data.samples.facades import draw_facades

        draw_facades(archive)

    def pack(self, archive: Path) -> Packed:
        """Reads, decodes and packs.

        Raises:
            SourceError: a split is missing, an image can't be decoded, or is not two squares side by side.
        """
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for name, content in sorted(read_archive(archive), key=lambda item: _natural(item[0])):
            split = ([""] * 2 + name.split("/"))[-2]
            if split in SPLITS and name.lower().endswith(SUFFIXES):
                found[split].append(self._halves(content, f"{archive}: {name}"))
        for split in ("train", "test"):
            if not found[split]:
                raise SourceError(
                    f"{archive}: no {split}/*.jpg in it; pairs belong into train/, test/ and, if there is one, val/"
                )
        if not found["val"]:
            if len(found["train"]) < 2:
                raise SourceError(
                    f"{archive}: train/ has one pair and there is no val/: val takes one, so give another"
                )
            order = np.random.default_rng(self.split_seed).permutation(len(found["train"]))
            held = set(order[: max(1, round(self.val_fraction * len(order)))].tolist())
            found["val"] = [pair for i, pair in enumerate(found["train"]) if i in held]
            found["train"] = [pair for i, pair in enumerate(found["train"]) if i not in held]
        arrays = {split: np.stack(found[split]) for split in SPLITS}  # [N, 2, 3, S, S]
        source, target = (0, 1) if self.direction == "AtoB" else (1, 0)
        meta = {
            "kind": self.kind,
            "shape": [3, self.size, self.size],
            "direction": self.direction,
            "palette": self.palette,
            "duplicates": duplicates({split: [pair.tobytes() for pair in pairs] for split, pairs in arrays.items()}),
        }
        return Packed({k: {"input": v[:, source], "target": v[:, target]} for k, v in arrays.items()}, meta)

    def _halves(self, content: bytes, name: str) -> np.ndarray:
        """A and B as uint8 [2, 3, S, S]."""
        pair = decode(content, name)
        height, width, _ = pair.shape
        if width != 2 * height:
            raise SourceError(f"{name} is {width}x{height}: a pair is two squares side by side, twice as wide as high")
        # Each half on its own: resized together, they would run into each other where they meet.
        halves = [resized(half, self.size) for half in (pair[:, :height], pair[:, height:])]
        return np.stack(halves).transpose(0, 3, 1, 2)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.replace(".", "/").split("/")]
