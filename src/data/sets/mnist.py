"""MNIST and data sets in its format: four IDX files, gzipped or not, of grey images and their labels."""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from src.configuration.schema import SplitSeed, ValFraction
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.packed import Packed, pack_images

FILE = re.compile(r"(train|t10k)-(images|labels)[.-]idx\d-ubyte(\.gz)?")  # with a dot if unpacked by hand
MAX_BYTES = 1 << 30  # of an unpacked file; MNIST's largest has 47 MB
DIGITS = list("0123456789")


class Mnist:
    """Reads an archive or a folder of `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`; `classes` names the labels."""

    kind = "images"
    archive_name = "mnist.tar"
    sample: str | None = "src.data.samples.digits"

    def __init__(self, *, classes: list[str], val_fraction: ValFraction = 0.1, split_seed: SplitSeed = 0) -> None:
        self.classes = classes
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        if classes != DIGITS:
            self.sample = None  # Fashion-MNIST has this format too, but its sample would show digits

    def pack(self, archive: Path) -> Packed:
        """Parses and checks the archive.

        Raises:
            SourceError: a file is missing, truncated, of another format, or holds an impossible label.
        """
        arrays: dict[tuple[str, str], np.ndarray] = {}
        for name, content in read_archive(archive):
            if match := FILE.fullmatch(name.rpartition("/")[2]):
                arrays[match[1], match[2]] = read_idx(content, f"{archive}: {name}")
        names = [(part, content) for part in ("train", "t10k") for content in ("images", "labels")]
        if missing := ["-".join(name) for name in names if name not in arrays]:
            raise SourceError(f"{archive}: no {' and no '.join(missing)} in it: give MNIST's four IDX files")
        train, test = (self._part(arrays, part, f"{archive}: {part}") for part in ("train", "t10k"))
        return pack_images(
            train, None, test, classes=self.classes, val_fraction=self.val_fraction, split_seed=self.split_seed
        )

    def _part(self, arrays: dict[tuple[str, str], np.ndarray], part: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, 1, H, W] and labels uint8 [N]."""
        images, labels = arrays[part, "images"], arrays[part, "labels"]
        if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
            raise SourceError(
                f"{name}: images of shape {images.shape} and labels of {labels.shape} do not fit; fetch them again"
            )
        if (largest := int(labels.max())) >= len(self.classes):
            raise SourceError(f"{name}: holds the label {largest}, but data.classes names {len(self.classes)} classes")
        return images[:, None], labels


def read_idx(content: bytes, name: str) -> np.ndarray:
    """Parses an IDX file of unsigned bytes, gzipped or not, as uint8 in the shape that it declares.

    Raises:
        SourceError: it is damaged or of another format.
    """
    try:
        if content.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        zero, kind, dimensions = struct.unpack_from(">HBB", content)
        if (zero, kind) != (0, 8):  # 8: unsigned bytes
            raise ValueError(f"starts with {content[:4].hex()}, not with an IDX file's 0000 08")
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        if (declared := math.prod(shape)) != len(content) - 4 - 4 * dimensions:
            raise ValueError(f"declares {declared:,} bytes, holds {len(content) - 4 - 4 * dimensions:,}")
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise SourceError(f"{name} is not an IDX file of bytes, or is damaged ({error}): fetch it again") from None
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
