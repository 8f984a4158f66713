"""Texts in folders named after their classes, aclImdb's layout `{train,test}/{pos,neg}/*.txt`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from src.configuration.schema import Encoding, OnBad, PositiveInt, SplitSeed, TestFraction, TextTokenizer, ValFraction
from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError
from src.data.folders import list_folders
from src.data.packed import SPLITS
from src.data.sets.texts import Examples, Texts, fault_of
from src.data.text_files import decode
from src.data.tokens import CHUNK

UNLABELLED = {"unsup": "without a label"}  # the folder of aclImdb


class ReviewFolders(Texts):
    """Reads a folder or an archive of class folders of texts, in `train/`, `test/` and optionally `val/`, or alone.

    Of class folders alone `test_fraction` and `val_fraction` of each class are drawn.
    """

    archive_name = "aclImdb_v1.tar.gz"
    sample: ClassVar[str | None] = "src.data.samples.reviews"

    def __init__(
        self,
        *,
        vocabulary: PositiveInt = 25000,
        tokenizer: TextTokenizer = None,
        encoding: Encoding = None,
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.1,
        test_fraction: TestFraction = 0.2,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def examples(self, archive: Path) -> Examples:
        files = Archive(archive)
        folders = list_folders(files, (".txt",), left_out=UNLABELLED, may_lack_splits=True)
        if folders.has_splits:
            folders.classes(archive, "*.txt in it")
        listed = [(split, example) for split in ("", *SPLITS) for example in folders.examples[split]]
        skipped = self._unusable(files, [example.name for _, example in listed]) if self.on_bad == "skip" else {}
        listed = [(split, example) for split, example in listed if example.name not in skipped]
        names = [example.name for _, example in listed]

        def texts() -> Iterator[list[str]]:
            for start in range(0, len(names), CHUNK):
                yield [self._text(files, name) for name in names[start : start + CHUNK]]

        return Examples(
            texts,
            labels=[example.label for _, example in listed],
            splits=[split for split, _ in listed],
            names=names,
            bad=[*skipped.items()],
            unused=folders.unused,
        )

    def _unusable(self, files: Archive, names: Sequence[str]) -> dict[str, str]:
        """The faults of the texts that have one, by the names of their files."""
        faults = {}
        for name in names:
            try:
                self._text(files, name)
            except SourceError as error:
                faults[name] = str(error).removeprefix(f"{files.path}: {name} ")
        return faults

    def _text(self, files: Archive, name: str) -> str:
        text = decode(files.read(name), f"{files.path}: {name}", self.encoding)
        if fault := fault_of(text):
            raise SourceError(f"{files.path}: {name} {fault}: remove it, or give on_bad: skip")
        return text
