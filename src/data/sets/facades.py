"""Pairs of images: side by side as in pix2pix's `{train,val,test}/*.jpg`, left A, right B; or in folders A/ and B/."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np

from src.configuration.schema import Colour, OnBad, PositiveInt, SplitSeed, TestFraction, ValFraction
from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF, list_folders
from src.data.image_files import SUFFIXES, WHITE, ImageError, fitted, open_image
from src.data.image_rows import Facts, ImageRows
from src.data.packed import SPLITS, Packed
from src.data.splitting import assign_splits


class PairedImages:
    """Reads a folder or an archive of pairs; both pictures are brought to `size` x `size`.

    A pair is a file of two squares side by side, or two files of the same name: `A/1.jpg` and `B/1.png`, also within
    splits, `train/A/` or `A/train/`. `val` is taken from the archive, or drawn from `train` if the archive has none;
    `test` is drawn where A and B have no splits. With `palette`, the label maps (the
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
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.1,
        test_fraction: TestFraction = 0.2,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.direction = direction
        self.size = size
        self.palette = palette
        self.background = background
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Lists the pairs; their files are decoded when they are written.

        Raises:
            SourceError: a split or the partner of a file is missing.
        """
        return self._packed(Archive(archive), frozenset())

    def _packed(self, archive: Archive, skipped: frozenset[str]) -> Packed:
        has_two_files = any(_place(PurePosixPath(name).parts) for name in archive.places)
        if has_two_files:
            pairs, unused = list_partners(archive, self.val_fraction, self.test_fraction, self.split_seed, skipped)
        else:
            pairs, unused = list_pairs(archive, self.val_fraction, self.split_seed, skipped)
        decode = (Partners if has_two_files else Halves)(self.size, self.background)
        source, target = (0, 1) if self.direction == "AtoB" else (1, 0)
        splits = {}
        for split in SPLITS:
            shape = (2, 3, self.size, self.size)
            rows = ImageRows(archive, pairs[split], decode, shape, files_per_row=2 if has_two_files else 1)
            splits[split] = {"input": rows.part(source), "target": rows.part(target)}
        meta = {
            "kind": self.kind,
            "shape": [3, self.size, self.size],
            "direction": self.direction,
            "palette": self.palette,
        }
        if self.background != WHITE:  # what a signature without a background means
            meta["background"] = self.background
        without = partial(self._packed, archive) if self.on_bad == "skip" else None
        return Packed(splits, meta, unused, without=without)


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


def _place(parts: Sequence[str]) -> tuple[str, str, str] | None:
    """Folder, split ("" for none) and name below both, without suffix, of a file in A/ or B/; None: neither."""
    for at, part in enumerate(parts[:-1]):
        if part not in ("A", "B"):
            continue
        above, below = parts[at - 1] if at else "", parts[at + 1] if at + 2 < len(parts) else ""
        split = next((name for name in (above, below) if name in SPLIT_OF), "")
        below_both = parts[at + 1 + (split == below != "") :]
        return part, SPLIT_OF.get(split, ""), PurePosixPath(*below_both).with_suffix("").as_posix()
    return None


def list_partners(
    archive: Archive, val_fraction: float, test_fraction: float, split_seed: int, skipped: Collection[str] = ()
) -> tuple[dict[str, list[str]], Counter[str]]:
    """The files of each split, that in A/ and that in B/ by turns, and the number of files without use, by reason.

    Raises:
        SourceError: a file has no partner of its name, or there are two of one name.
    """
    unused: Counter[str] = Counter()
    pairs: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # by split and name: the files by folder
    for name, place in archive.places.items():
        if place is None:
            continue
        parts = PurePosixPath(name).parts
        part_of = _place(parts)
        if any(part.startswith(".") for part in parts[1:]):
            unused["hidden"] += 1
        elif part_of is None:
            unused["outside A/ and B/"] += 1
        elif not name.lower().endswith(SUFFIXES):
            unused["of another kind"] += 1
        else:
            folder, split, stem = part_of
            if (other := pairs[split, stem].setdefault(folder, name)) != name:
                raise SourceError(f"{archive.path}: {other} and {name} have the same name: keep one of them")
    for (_, stem), files in pairs.items():
        if len(files) < 2:
            ((folder, name),) = files.items()
            partner = "B" if folder == "A" else "A"
            raise SourceError(f"{archive.path}: {name} has no partner: add {stem} to {partner}/, or remove it")
    keys = sorted(pairs, key=lambda key: (key[0], _natural(key[1])))
    keys = [key for key in keys if not any(name in skipped for name in pairs[key].values())]
    try:
        assigned = assign_splits(
            [""] * len(keys),
            splits=[split for split, _ in keys],
            groups=None,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=split_seed,
        )
    except SourceError as error:
        raise SourceError(f"{archive.path}: {error}") from None
    listed: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key, split in zip(keys, assigned, strict=True):
        listed[split] += [pairs[key]["A"], pairs[key]["B"]]
    return listed, unused


@dataclass(frozen=True)
class Partners:
    """Decodes two files of the same proportions to A and B, uint8 [2, 3, size, size]."""

    size: int
    background: str = WHITE

    def __call__(self, files: Sequence[tuple[bytes, str]]) -> tuple[np.ndarray, Facts]:
        (first, mode), (second, _) = (open_image(*file, background=self.background) for file in files)
        if first.width * second.height != second.width * first.height:
            sizes = [f"{one.width}x{one.height}" for one in (first, second)]
            raise ImageError(
                files[1][1], f"is {sizes[1]}, but {files[0][1]} is {sizes[0]}", "a pair has the same proportions"
            )
        pixels = np.stack([fitted(picture, self.size, self.size) for picture in (first, second)])
        return pixels, Facts(*first.size, mode, len(files[0][0]))


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
