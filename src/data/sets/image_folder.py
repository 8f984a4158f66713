"""Images in folders named after their classes: `train/<class>/*.png`, `test/<class>/*.png`, optionally `val/`."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path
from typing import ClassVar

import numpy as np

from src.configuration.schema import PositiveInt, SplitSeed, ValFraction
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.packed import SPLITS, Packed, pack_images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "PPM",
)  # of these suffixes; some others start programs


class ImageFolders:
    """Reads a folder or an archive of class folders; images are decoded to RGB and resized to `size` x `size`."""

    kind = "images"
    archive_name = "images.tar"
    sample: ClassVar[str | None] = None

    def __init__(self, *, size: PositiveInt = 32, val_fraction: ValFraction = 0.1, split_seed: SplitSeed = 0) -> None:
        self.size = size
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and decodes the archive.

        Raises:
            SourceError: a split or a class is missing, or an image can't be decoded.
        """
        examples: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)
        for name, content in sorted(read_archive(archive)):
            split, label = ([""] * 3 + name.split("/"))[-3:-1]
            if split in SPLITS and name.lower().endswith(SUFFIXES):
                image = resized(decode(content, f"{archive}: {name}"), self.size)
                examples[split].append((label, image.transpose(2, 0, 1)))
        for split in ("train", "test"):
            if not examples[split]:
                raise SourceError(
                    f"{archive}: no {split}/<class>/*.png in it (or {', '.join(SUFFIXES[1:])}); see docs/your-data.md"
                )
        classes = sorted({label for label, _ in examples["train"]})
        if unprintable := [label for label in classes if not label.isprintable()]:
            raise SourceError(
                f"{archive}: train/ has the class {unprintable[0]!r}: rename it, a name must be printable UTF-8"
            )
        for split in ("val", "test"):
            if unknown := sorted({label for label, _ in examples[split]} - set(classes)):
                raise SourceError(
                    f"{archive}: {split}/ has the class {unknown[0]!r} that train/ lacks; "
                    f"train/ has {', '.join(classes)}"
                )
        if len(classes) < 2:
            raise SourceError(f"{archive}: train/ has only the class {classes[0]!r}: give at least two")
        arrays = {
            split: (np.stack([image for _, image in items]), np.array([classes.index(label) for label, _ in items]))
            for split, items in examples.items()
            if items
        }
        return pack_images(
            arrays["train"],
            arrays.get("val"),
            arrays["test"],
            classes=classes,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
        )


def decode(content: bytes, name: str) -> np.ndarray:
    """Decodes an image to RGB uint8 [H, W, 3].

    Raises:
        SourceError: naming the image that can't be decoded.
    """
    from PIL import Image

    try:
        return np.asarray(Image.open(io.BytesIO(content), formats=FORMATS).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{name} can't be read as an image ({error}): remove or replace it") from None


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """An image, uint8 [H, W, 3], as [size, size, 3]."""
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
