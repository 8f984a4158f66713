"""Images to classify: folders named after their classes, or a table that names each image's file and class."""

from __future__ import annotations

from pathlib import Path

from src.configuration.schema import (
    Channels,
    Colour,
    FileColumns,
    Fit,
    ImageSize,
    ManifestColumns,
    ManifestFile,
    OnBad,
    SplitSeed,
    TestFraction,
    ValFraction,
)
from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError
from src.data.folders import Folders, list_folders
from src.data.image_files import SUFFIXES
from src.data.image_rows import FittedImage, LabelledFiles, pack_image_files
from src.data.manifests import list_manifest
from src.data.packed import Packed
from src.data.splitting import assign_splits


class ImageFolders:
    """Reads a folder or an archive of labelled images, decoded to 8 bits and brought to one size.

    Three layouts: class folders in `train/`, `test/` and optionally `val/`; class folders alone, of each of which
    `test_fraction` and `val_fraction` are drawn; or, with `manifest`, a table file with a row for each image.
    """

    kind = "images"
    archive_name = "images.tar"
    sample: str | None = None

    def __init__(
        self,
        *,
        size: ImageSize = 32,
        channels: Channels = 3,
        fit: Fit = "stretch",
        background: Colour = "white",
        manifest: ManifestFile = None,
        columns: ManifestColumns = None,
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.1,
        test_fraction: TestFraction = 0.2,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.size = size
        self.channels = channels
        self.fit = fit
        self.background = background
        self.manifest = manifest
        self.columns = columns or FileColumns()
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Lists the examples; their files are decoded when they are written.

        Raises:
            SourceError: a split or a class is missing, or the manifest names a file that is not there.
        """
        sides = self.size if isinstance(self.size, list) else [self.size, self.size]
        if len(sides) != 2:
            raise SourceError(f"data.size: {self.size}: give the pixels a side, or [height, width]")
        decode = FittedImage((self.channels, sides[0], sides[1]), self.fit, self.background)
        files = Archive(archive)
        all_classes: list[str] = []  # those without skipped files

        def pack_without(skipped: frozenset[str]) -> Packed:
            folders = self._list(files, skipped)
            classes = folders.classes(archive, f"*.png in it (or {', '.join(SUFFIXES[1:])})")
            if lost := [label for label in all_classes if label not in classes]:
                raise SourceError(f"{archive}: no file of the class {lost[0]!r} in train/ can be read: replace them")
            all_classes[:] = classes
            numbers = {label: number for number, label in enumerate(classes)}
            return pack_image_files(
                files,
                {
                    split: LabelledFiles(
                        [example.name for example in examples], [numbers[example.label] for example in examples]
                    )
                    for split, examples in folders.examples.items()
                    if examples
                },
                decode,
                classes=classes,
                val_fraction=self.val_fraction,
                split_seed=self.split_seed,
                unused=folders.unused,
                without=pack_without if self.on_bad == "skip" else None,
            )

        return pack_without(frozenset())

    def _list(self, archive: Archive, skipped: frozenset[str]) -> Folders[None]:
        if self.manifest is None:
            folders = list_folders(archive, SUFFIXES, skipped=skipped, may_lack_splits=True)
            if folders.has_splits:
                return folders
            examples, splits, groups = folders.examples[""], None, None
            del folders.examples[""]
        else:
            folders, examples, splits, groups = list_manifest(
                archive,
                self.manifest,
                file=self.columns.file,
                label=self.columns.label,
                split=self.columns.split,
                group=self.columns.group,
                skipped=skipped,
            )
        try:
            assigned = assign_splits(
                [example.label for example in examples],
                splits=splits,
                groups=groups,
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                seed=self.split_seed,
            )
        except SourceError as error:
            raise SourceError(f"{archive.path}: {self.manifest or 'class folders'}: {error}") from None
        for example, split in zip(examples, assigned, strict=True):
            folders.examples[split].append(example)
        return folders
