"""Images in folders named after their classes: `train/<class>/*.png`, `test/<class>/*.png`, optionally `val/`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from src.configuration.schema import Colour, PositiveInt, SplitSeed, ValFraction
from src.data.fetching.archives import Archive
from src.data.folders import list_folders
from src.data.image_files import SUFFIXES
from src.data.image_rows import FittedImage, LabelledFiles, pack_image_files
from src.data.packed import Packed


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
        return self._packed(Archive(archive), frozenset())

    def _packed(self, archive: Archive, skipped: frozenset[str]) -> Packed:
        folders = list_folders(archive, SUFFIXES, skipped=skipped)
        classes = folders.classes(archive.path, f"*.png in it (or {', '.join(SUFFIXES[1:])})")
        return pack_image_files(
            archive,
            {
                split: LabelledFiles(
                    [example.name for example in examples], [classes.index(example.label) for example in examples]
                )
                for split, examples in folders.examples.items()
                if examples
            },
            FittedImage((3, self.size, self.size), background=self.background),
            classes=classes,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
            unused=folders.unused,
        )
