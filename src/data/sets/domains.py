"""Two domains of images without pairs, in CycleGAN's layout: `trainA`, `trainB`, `testA`, `testB`, also `valA`, `valB`.

Or two folders of any names with `train/` and `test/` in each: `summer/train/*.jpg`, `winter/train/*.jpg`, ...
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np

from src.configuration.schema import Colour, Enlarge, OnBad, PositiveInt, SplitSeed, TwoNames, ValFraction
from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF
from src.data.image_files import SUFFIXES, WHITE, fitted, open_image
from src.data.image_rows import Facts, FittedImage, ImageRows, LabelledFiles, Streamed, pack_image_files
from src.data.packed import SPLITS, Packed, stratified_holdout
from src.data.sets.facades import Halves, list_pairs

LAYOUT = "trainA/, trainB/, testA/ and testB/, or two folders with train/ and test/ in each"
Place = tuple[str, str]  # split, domain


@dataclass(frozen=True)
class Pictures:
    """The images of one split and domain: their paths below their folder, sorted, and in the archive."""

    names: list[str]
    files: list[str]


@dataclass
class Domains:
    """The pictures of the domains by split, first domain first, and the number of files without use, by reason."""

    pictures: dict[str, list[Pictures]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)


def list_domains(archive: Archive, *, keep_duplicates: bool, skipped: Collection[str] = ()) -> Domains:
    """Lists the images of an archive of two domains, in the order of their names.

    Without `keep_duplicates` training files that are byte for byte another image of the archive are left out.

    Raises:
        SourceError: the archive has another layout, or a domain lacks a split.
    """
    unused: Counter[str] = Counter()
    files: dict[Place, dict[str, str]] = defaultdict(dict)  # the archive's name of each file, by that below its folder
    folders: dict[Place, str] = {}
    for name, content in archive.places.items():
        if content is None or name in skipped:
            continue
        parts = PurePosixPath(name).parts
        if reason := _reason(parts):
            unused[reason] += 1
            continue
        place, depth = _place(parts)
        folder = "/".join(parts[:depth])
        if folders.setdefault(place, folder) != folder:
            raise SourceError(
                f"{archive.path}: both {folders[place]}/ and {folder}/ are the same part of the data: keep one"
            )
        files[place]["/".join(parts[depth:])] = name
    domains = _two_domains(archive.path, files)
    if not keep_duplicates:
        unused["duplicates of other images"] = _drop_duplicates(archive, files)
    pictures = {
        split: [_sorted_pictures(files[split, domain]) for domain in domains if (split, domain) in folders]
        for split in SPLITS
    }
    return Domains({split: pair for split, pair in pictures.items() if pair}, unused)


def _sorted_pictures(files: Mapping[str, str]) -> Pictures:
    names = sorted(files)
    return Pictures(names, [files[name] for name in names])


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


def _drop_duplicates(archive: Archive, places: Mapping[Place, dict[str, str]]) -> int:
    """Removes training files whose bytes another file has, a test, validation or earlier training one; their number."""
    training = [files for (split, _), files in sorted(places.items()) if split == "train"]
    others = [files for (split, _), files in places.items() if split != "train"]
    seen = {hashlib.sha256(archive.read(file)).digest() for files in others for file in files.values()}
    dropped = 0
    for files in training:
        for name, file in sorted(files.items()):
            digest = hashlib.sha256(archive.read(file)).digest()
            if digest in seen:
                del files[name]
                dropped += 1
            seen.add(digest)
    return dropped


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
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.classes = classes
        self.size = size
        self.background = background
        self.duplicates = duplicates
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Lists the images; their files are decoded when they are written.

        Raises:
            SourceError: the archive has another layout, or an image can't be decoded.
        """
        return self._packed(Archive(archive), frozenset())

    def _packed(self, archive: Archive, skipped: frozenset[str]) -> Packed:
        domains = list_domains(archive, keep_duplicates=self.duplicates == "keep", skipped=skipped)
        parts = {
            split: LabelledFiles(
                [file for part in pair for file in part.files],
                [label for label, part in enumerate(pair) for _ in part.files],
            )
            for split, pair in domains.pictures.items()
        }
        return pack_image_files(
            archive,
            parts,
            FittedImage((3, self.size, self.size), background=self.background),
            classes=self.classes,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
            unused=+domains.unused,
            without=partial(self._packed, archive) if self.on_bad == "skip" else None,
        )


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
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.05,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.size = size
        self.enlarge = enlarge
        self.background = background
        self.paired_test = paired_test
        self.duplicates = duplicates
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Lists the images; their files are decoded when they are written.

        Without validation images they are drawn from each domain's training part.

        Raises:
            SourceError: the archive has another layout, an image can't be decoded, or, with `paired_test`, the test
                images of the domains have other names.
        """
        return self._packed(Archive(archive), frozenset())

    def _packed(self, archive: Archive, skipped: frozenset[str]) -> Packed:
        enlarged = round(self.size * self.enlarge)
        domains = list_domains(archive, keep_duplicates=self.duplicates == "keep", skipped=skipped)
        first, second = domains.pictures["test"]
        if self.paired_test and (unequal := sorted(set(first.names) ^ set(second.names))):
            raise SourceError(
                f"{archive.path}: data.paired_test: the test image {unequal[0]} is in one domain only; "
                "rename it, or set data.paired_test=false"
            )
        files = {split: [part.files for part in pair] for split, pair in domains.pictures.items()}
        sizes = {"train": [enlarged], "val": [self.size], "test": [self.size]}
        if "val" not in files:
            files["train"], files["val"] = hold_out(files["train"], self.val_fraction, self.split_seed)
            sizes["val"] = [enlarged, self.size]  # drawn from the training images as they are packed
        splits = {}
        for split in SPLITS:
            decode = Resized(tuple(sizes[split]), self.background)
            shape = (1, 3, sizes[split][-1], sizes[split][-1])
            splits[split] = {
                domain: ImageRows(archive, names, decode, shape).part()
                for domain, names in zip("ab", files[split], strict=True)
            }
        packed = pack_unpaired(splits, self.size, self.background, self.paired_test, None, +domains.unused)
        return replace(packed, without=partial(self._packed, archive) if self.on_bad == "skip" else None)


@dataclass(frozen=True)
class Resized:
    """Decodes a file to a square image, resized to several `sizes` one after another: uint8 [1, 3, S, S]."""

    sizes: tuple[int, ...]
    background: str = WHITE

    def __call__(self, files: Sequence[tuple[bytes, str]]) -> tuple[np.ndarray, Facts]:
        from PIL import Image

        ((content, name),) = files
        picture, mode = open_image(content, name, background=self.background)
        facts = Facts(*picture.size, mode, len(content))
        for size in self.sizes[:-1]:
            picture = Image.fromarray(fitted(picture, size, size).transpose(1, 2, 0))
        return fitted(picture, self.sizes[-1], self.sizes[-1])[None], facts


def hold_out(domains: Sequence[list[str]], fraction: float, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """The training and the validation files of each domain, the latter drawn from the former."""
    train, val = [], []
    for domain, files in zip("AB", domains, strict=True):
        if len(files) < 2:
            raise SourceError(f"train{domain} has one image and there is no validation part: give at least two")
        keep, held = stratified_holdout(np.zeros(len(files)), fraction, seed)
        train.append([files[i] for i in keep.tolist()])
        val.append([files[i] for i in held.tolist()])
    return train, val


def pack_unpaired(
    splits: Mapping[str, dict[str, Streamed]],
    size: int,
    background: str,
    paired_test: bool,
    palette: str | None,
    unused: Mapping[str, int],
) -> Packed:
    """Packs the domains' images, `a` and `b` of each split.

    `palette` names the colours of the label maps that domain B holds, if it does.
    """
    meta = {"kind": "unpaired", "shape": [3, size, size], "paired_test": paired_test, "palette": palette}
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
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.size = size
        self.enlarge = enlarge
        self.palette = palette
        self.background = background
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Lists the images; their files are decoded when they are written.

        Raises:
            SourceError: a split is missing, or a file is no pair.
        """
        return self._packed(Archive(archive), frozenset())

    def _packed(self, archive: Archive, skipped: frozenset[str]) -> Packed:
        pairs, unused = list_pairs(archive, self.val_fraction, self.split_seed, skipped)
        splits = {}
        for split in SPLITS:
            size = round(self.size * self.enlarge) if split == "train" else self.size
            decode = Halves(size, self.background)
            rows = ImageRows(archive, pairs[split], decode, (2, 3, size, size), equal="parts")
            splits[split] = {"a": rows.part(0), "b": rows.part(1)}
        packed = pack_unpaired(splits, self.size, self.background, True, self.palette, unused)
        return replace(packed, without=partial(self._packed, archive) if self.on_bad == "skip" else None)
