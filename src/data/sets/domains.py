"""Two domains of images without pairs, in CycleGAN's layout: `trainA`, `trainB`, `testA`, `testB`, also `valA`, `valB`.

Or two folders of any names with `train/` and `test/` in each: `summer/train/*.jpg`, `winter/train/*.jpg`, ...
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np

from src.configuration.schema import Colour, Enlarge, PositiveInt, SplitSeed, TwoNames, ValFraction
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF
from src.data.image_files import SUFFIXES, WHITE, decode, resized
from src.data.packed import SPLITS, Arrays, Packed, pack_images, stratified_holdout
from src.data.packed import duplicates as count_duplicates
from src.data.sets.facades import PairedImages

LAYOUT = "trainA/, trainB/, testA/ and testB/, or two folders with train/ and test/ in each"
Place = tuple[str, str]  # split, domain


@dataclass(frozen=True)
class Pictures:
    """The images of one split and domain: their paths below their folder, sorted, and uint8 [N, 3, S, S]."""

    names: list[str]
    pixels: np.ndarray


@dataclass
class Domains:
    """The pictures of the domains by split, first domain first, and the number of files without use, by reason."""

    pictures: dict[str, list[Pictures]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)


def read_domains(archive: Path, *, sizes: Mapping[str, int], background: str, keep_duplicates: bool) -> Domains:
    """Reads and decodes an archive of two domains, in the order of their names.

    `sizes` says how many pixels a side the images of each split become. Without `keep_duplicates` training files that
    are byte for byte another image of the archive are left out.

    Raises:
        SourceError: the archive has another layout, a domain lacks a split, or an image can't be decoded.
    """
    unused: Counter[str] = Counter()
    contents: dict[Place, dict[str, bytes]] = defaultdict(dict)  # by file name
    folders: dict[Place, str] = {}
    for name, content in read_archive(archive):
        parts = PurePosixPath(name).parts
        if reason := _reason(parts):
            unused[reason] += 1
            continue
        place, depth = _place(parts)
        folder = "/".join(parts[:depth])
        if folders.setdefault(place, folder) != folder:
            raise SourceError(
                f"{archive}: both {folders[place]}/ and {folder}/ are the same part of the data: keep one"
            )
        contents[place]["/".join(parts[depth:])] = content
    domains = _two_domains(archive, contents)
    if not keep_duplicates:
        unused["duplicates of other images"] = _drop_duplicates(contents)
    pictures = {
        split: [
            _decoded(contents[split, domain], f"{archive}: {folders[split, domain]}", sizes[split], background)
            for domain in domains
            if (split, domain) in folders
        ]
        for split in SPLITS
    }
    return Domains({split: pair for split, pair in pictures.items() if pair}, unused)


def _place(parts: Sequence[str]) -> tuple[Place, int]:
    """A file's split and domain, and how many parts of its name lead to their folder; 0: it lies in none."""
    for depth, part in enumerate(parts[:-1], 1):
        if part[:-1] in SPLIT_OF and part[-1] in "AB":
            return (SPLIT_OF[part[:-1]], part[-1]), depth
        if part in SPLIT_OF and depth > 1:
            return (SPLIT_OF[part], parts[depth - 2]), depth
    return ("", ""), 0


def _reason(parts: Sequence[str]) -> str:
    """Why a file is not used; empty: it is."""
    if any(part.startswith(".") for part in parts[1:]):
        return "hidden"
    if not _place(parts)[1]:
        return "outside the domains' folders"
    return "" if parts[-1].lower().endswith(SUFFIXES) else "of another kind"


def _two_domains(archive: Path, places: Iterable[Place]) -> list[str]:
    """The names of the domains, sorted.

    Raises:
        SourceError: there are not two, or a split has images of only one.
    """
    places = set(places)
    domains = sorted({domain for _, domain in places})
    if len(domains) != 2:
        names = f" ({', '.join(domains)})" if domains else ""
        raise SourceError(f"{archive}: {len(domains)} domains of images{names}, not two: files go into {LAYOUT}")
    required = [split for split in SPLITS if split != "val" or any(split == "val" for split, _ in places)]
    if missing := [
        f"{split} images of {domain}" for split in required for domain in domains if (split, domain) not in places
    ]:
        raise SourceError(f"{archive}: no {missing[0]}: files go into {LAYOUT}")
    return domains


def _drop_duplicates(contents: dict[Place, dict[str, bytes]]) -> int:
    """Removes training files whose bytes another file has, a test, validation or earlier training one; their number."""
    training = [files for (split, _), files in sorted(contents.items()) if split == "train"]
    others = [files for (split, _), files in contents.items() if split != "train"]
    seen = {hashlib.sha256(content).digest() for files in others for content in files.values()}
    dropped = 0
    for files in training:
        for name, content in sorted(files.items()):
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                del files[name]
                dropped += 1
            seen.add(digest)
    return dropped


def _decoded(files: dict[str, bytes], folder: str, size: int, background: str) -> Pictures:
    names = sorted(files)
    pixels = np.empty((len(names), 3, size, size), np.uint8)
    for image, name in zip(pixels, names, strict=True):
        picture = decode(files[name], f"{folder}/{name}", background=background)
        image[:] = resized(picture, size, size).transpose(2, 0, 1)
    return Pictures(names, pixels)


class DomainClasses:
    """The two domains as two classes of labelled images, for a classifier."""

    kind = "images"
    archive_name = "horse2zebra.zip"
    sample: ClassVar[str] = "src.data.samples.domains"

    def __init__(
        self,
        *,
        classes: TwoNames,
        size: PositiveInt = 144,
        background: Colour = "white",
        duplicates: Literal["keep", "drop"] = "drop",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.classes = classes
        self.size = size
        self.background = background
        self.duplicates = duplicates
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and decodes the archive.

        Raises:
            SourceError: the archive has another layout, or an image can't be decoded.
        """
        domains = read_domains(
            archive,
            sizes=dict.fromkeys(SPLITS, self.size),
            background=self.background,
            keep_duplicates=self.duplicates == "keep",
        )
        parts = {
            split: (
                np.concatenate([part.pixels for part in pair]),
                np.repeat(np.arange(2), [len(part.names) for part in pair]),
            )
            for split, pair in domains.pictures.items()
        }
        packed = pack_images(
            parts["train"],
            parts.get("val"),
            parts["test"],
            classes=self.classes,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
        )
        shown = {} if self.background == WHITE else {"background": self.background}
        return replace(packed, meta=packed.meta | shown, unused=+domains.unused)


class UnpairedDomains:
    """The two domains for translation without pairs.

    Training images are packed `enlarge` times as large as those of the other splits, and cropped when batches are made:
    nothing is resized in training. With `paired_test` the test images of the same name in both domains show the same
    scene, so that a translation can be compared with the true one.
    """

    kind = "unpaired"
    archive_name = "horse2zebra.zip"
    sample: ClassVar[str] = "src.data.samples.domains"

    def __init__(
        self,
        *,
        size: PositiveInt = 128,
        enlarge: Enlarge = 1.117,
        background: Colour = "white",
        paired_test: bool = False,
        duplicates: Literal["keep", "drop"] = "keep",
        val_fraction: ValFraction = 0.05,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.size = size
        self.enlarge = enlarge
        self.background = background
        self.paired_test = paired_test
        self.duplicates = duplicates
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and decodes the archive; without validation images they are drawn from each domain's training part.

        Raises:
            SourceError: the archive has another layout, an image can't be decoded, or, with `paired_test`, the test
                images of the domains have other names.
        """
        sizes = {"train": round(self.size * self.enlarge), "val": self.size, "test": self.size}
        domains = read_domains(
            archive, sizes=sizes, background=self.background, keep_duplicates=self.duplicates == "keep"
        )
        pictures = domains.pictures
        first, second = pictures["test"]
        if self.paired_test and (unequal := sorted(set(first.names) ^ set(second.names))):
            raise SourceError(
                f"{archive}: data.paired_test: the test image {unequal[0]} is in one domain only; "
                "rename it, or set data.paired_test=false"
            )
        splits: dict[str, Arrays] = {
            split: dict(zip("ab", (part.pixels for part in pair), strict=True)) for split, pair in pictures.items()
        }
        if "val" not in splits:
            splits = hold_out(splits, self.size, self.val_fraction, self.split_seed)
        return pack_unpaired(splits, self.size, self.background, self.paired_test, None, +domains.unused)


def hold_out(splits: Mapping[str, Arrays], size: int, fraction: float, seed: int) -> dict[str, Arrays]:
    """The splits with a validation part of `size` x `size`, drawn from the training part of each domain."""
    train: Arrays = {}
    val: Arrays = {}
    for domain, images in splits["train"].items():
        if len(images) < 2:
            raise SourceError(f"train{domain.upper()} has one image and there is no validation part: give at least two")
        keep, held = stratified_holdout(np.zeros(len(images)), fraction, seed)
        train[domain] = images[keep]
        val[domain] = np.stack([resized(image.transpose(1, 2, 0), size, size) for image in images[held]])
        val[domain] = val[domain].transpose(0, 3, 1, 2)
    return {"train": train, "val": val, "test": splits["test"]}


def pack_unpaired(
    splits: dict[str, Arrays],
    size: int,
    background: str,
    paired_test: bool,
    palette: str | None,
    unused: Mapping[str, int],
) -> Packed:
    """Packs the domains' images, `a` and `b` of each split.

    `palette` names the colours of the label maps that domain B holds, if it does.
    """
    meta = {
        "kind": "unpaired",
        "shape": [3, size, size],
        "paired_test": paired_test,
        "palette": palette,
        "duplicates": count_duplicates(
            {
                split: [image.tobytes() for domain in "ab" for image in arrays[domain]]
                for split, arrays in splits.items()
            }
        ),
    }
    if background != WHITE:  # what a signature without a background means
        meta["background"] = background
    return Packed(splits, meta, unused)


class UnpairedHalves:
    """The two halves of pix2pix's pairs as domains, A left and B right, whose pairing only the test keeps."""

    kind = "unpaired"
    archive_name = "facades.tar.gz"
    sample: ClassVar[str] = "src.data.samples.facades"

    def __init__(
        self,
        *,
        size: PositiveInt = 128,
        enlarge: Enlarge = 1.117,
        palette: Literal["facades"] | None = None,
        background: Colour = "white",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.size = size
        self.enlarge = enlarge
        self.palette = palette
        self.background = background
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and decodes the archive.

        Raises:
            SourceError: a split is missing, or a file is no pair.
        """
        small, large = (
            PairedImages(
                size=size, background=self.background, val_fraction=self.val_fraction, split_seed=self.split_seed
            ).pack(archive)
            for size in (self.size, round(self.size * self.enlarge))
        )
        parts = {"train": large.splits["train"], "val": small.splits["val"], "test": small.splits["test"]}
        splits = {split: {"a": arrays["input"], "b": arrays["target"]} for split, arrays in parts.items()}
        return pack_unpaired(splits, self.size, self.background, True, self.palette, small.unused)
