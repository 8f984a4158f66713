"""Texts in folders named after their classes, aclImdb's layout `{train,test}/{pos,neg}/*.txt`, as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from src.configuration.schema import PositiveInt, SplitSeed, ValFraction
from src.data.fetching.files import SourceError
from src.data.folders import read_folders
from src.data.packed import SPLITS
from src.data.sets.texts import Examples, OnBad, Texts, TextTokenizer, chunks_of, fault_of
from src.data.text_files import Encoding, decode

UNLABELLED = {"unsup": "without a label"}  # the folder of aclImdb


class ReviewFolders(Texts):
    """Reads a folder or an archive of class folders of texts."""

    archive_name = "aclImdb_v1.tar.gz"
    sample: ClassVar[str | None] = "src.data.samples.reviews"

    def __init__(
        self,
        *,
        vocabulary: PositiveInt = 25000,
        tokenizer: TextTokenizer = None,
        encoding: Encoding | None = None,
        on_bad: OnBad = "refuse",
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.on_bad = on_bad
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def examples(self, archive: Path) -> Examples:
        skipped: dict[str, str] = {}

        def read(content: bytes, name: str) -> str | None:
            try:
                return self._text(content, name)
            except SourceError as error:
                if self.on_bad == "refuse":
                    raise
                skipped[name.removeprefix(f"{archive}: ")] = str(error)
                return None

        folders = read_folders(archive, read, (".txt",), left_out=UNLABELLED)
        folders.classes(archive, "*.txt in it")
        examples = Examples(lambda: chunks_of(texts), skipped=skipped, unused=folders.unused)
        texts = []
        for split in SPLITS:
            for example in folders.examples[split]:
                if example.content is not None:
                    texts.append(example.content)
                    examples.labels.append(example.label)
                    examples.splits.append(split)
                    examples.names.append(example.name)
        return examples

    def _text(self, content: bytes, name: str) -> str:
        text = decode(content, name, self.encoding)
        if fault := fault_of(text):
            raise SourceError(f"{name} {fault}: remove it, or give on_bad: skip")
        return text
