"""Images in folders named after their classes: `train/<class>/*.png`, `test/<class>/*.png`, optionally `val/`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from src.configuration.schema import Colour, PositiveInt, SplitSeed, ValFraction
from src.data.folders import read_folders
from src.data.image_files import SUFFIXES, WHITE, decode, resized
from src.data.packed import Packed, pack_images


class ImageFolders:
    """Reads a folder or an archive of class folders; images are decoded to RGB and resized to `size` x `size`."""

    kind = "images"
    archive_name = "images.tar"
    sample: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        size: PositiveInt = 32,
        background: Colour = "white",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.size = size
        self.background = background
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and decodes the archive.

        Raises:
            SourceError: a split or a class is missing, or an image can't be decoded.
        """
        folders = read_folders(archive, self._image, SUFFIXES)
        classes = folders.classes(archive, f"*.png in it (or {', '.join(SUFFIXES[1:])})")
        arrays = {
            split: (
                np.stack([example.content for example in examples]),
                np.array([classes.index(example.label) for example in examples]),
            )
            for split, examples in folders.examples.items()
            if examples
        }
        packed = pack_images(
            arrays["train"],
            arrays.get("val"),
            arrays["test"],
            classes=classes,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
        )
        shown = {} if self.background == WHITE else {"background": self.background}
        return replace(packed, meta=packed.meta | shown, unused=folders.unused)

    def _image(self, content: bytes, name: str) -> np.ndarray:
        """An image file as uint8 [3, S, S]."""
        image = decode(content, name, background=self.background)
        return resized(image, self.size, self.size).transpose(2, 0, 1)
