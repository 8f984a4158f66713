"""Two domains of images without pairs, in CycleGAN's layout: `trainA`, `trainB`, `testA`, `testB`, also `valA`, `valB`.

Or two folders of any names with `train/` and `test/` in each: `summer/train/*.jpg`, `winter/train/*.jpg`, ...
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from src.configuration.schema import Colour, PositiveInt, SplitSeed, ValFraction
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF
from src.data.image_files import SUFFIXES, WHITE, decode, resized
from src.data.packed import SPLITS, Packed, pack_images

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


def read_domains(archive: Path, *, size: int, background: str, keep_duplicates: bool) -> Domains:
    """Reads and decodes an archive of two domains, in the order of their names; images become `size` x `size`.

    Without `keep_duplicates` training files that are byte for byte another image of the archive are left out.

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
            _decoded(contents[split, domain], f"{archive}: {folders[split, domain]}", size, background)
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
        classes: Annotated[list[str], Field(min_length=2, max_length=2)],
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
            archive, size=self.size, background=self.background, keep_duplicates=self.duplicates == "keep"
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
