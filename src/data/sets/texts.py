"""Labelled texts as words or subwords: what folders and tables of texts have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from src.configuration.schema import Pretrained
from src.data import subwords
from src.data.fetching.files import SourceError
from src.data.folders import class_names
from src.data.packed import SPLITS, Arrays, Packed, equal_digests
from src.data.splitting import assign_splits
from src.data.tokens import BREAK, Subwords, Tokenizer, Words, encode

SUBSTITUTIONS = ((f"(?i){BREAK.pattern}", " "),)


@dataclass
class Examples:
    """Texts and what is known of each."""

    texts: Callable[[], Iterator[list[str]]]  # in chunks; called again for another pass
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # "" where it is to be drawn
    groups: list[Any] | None = None
    names: list[str] = field(default_factory=list)  # of the files
    lines: list[int] | None = None  # of each example in its file
    bad: list[tuple[str, str]] = field(default_factory=list)  # examples that are left out, each with its fault
    unused: Counter[str] = field(default_factory=Counter)

    def facts(self, rows: np.ndarray) -> dict[str, list[Any]]:
        """Where the examples stand; `rows`: bool of each example."""
        indices = np.flatnonzero(rows).tolist()
        lines = {} if self.lines is None else {"line": [self.lines[i] for i in indices]}
        return {"name": [self.names[i] for i in indices], **lines}


class Texts(ABC):
    """Tokenizes texts that have a class each.

    With torchtext's `basic_english`; the vocabulary is the `vocabulary` most frequent words of the training part, after
    `<unk>` and `<pad>`. Or into subwords: `bpe` learns `vocabulary` pieces from the training part, and those of a text
    encoder come by its `tokenizer` and with its vocabulary.
    """

    kind = "text"
    sample: ClassVar[str | None] = None
    vocabulary: int
    tokenizer: Literal["bpe"] | Pretrained | None
    val_fraction: float
    test_fraction: float
    split_seed: int

    @abstractmethod
    def examples(self, archive: Path) -> Examples:
        """Reads the archive.

        Raises:
            SourceError: it does not hold what it should.
        """

    def pack(self, archive: Path) -> Packed:
        """Parses and tokenizes the archive.

        Raises:
            SourceError: a split or a class is missing, or a text is empty or not decodable.
        """
        examples = self.examples(archive)
        try:
            assigned = assign_splits(
                examples.labels,
                splits=examples.splits,
                groups=examples.groups,
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                seed=self.split_seed,
            )
        except SourceError as error:
            raise SourceError(f"{archive}: {error}") from None
        splits = np.array(assigned)
        of_split = {k: {examples.labels[i] for i in np.flatnonzero(splits == k).tolist()} for k in SPLITS}
        classes = class_names(archive, of_split)
        tokenizer = self._tokenizer(archive, examples, splits)
        tokens = encode(tokenizer, examples.texts(), splits, archive.parent)
        number = {label: i for i, label in enumerate(classes)}
        labels = np.array([number[label] for label in examples.labels], np.int64)
        arrays: dict[str, Arrays] = {}
        for split in SPLITS:
            ids, offsets = tokens[split].arrays()
            arrays[split] = {"tokens": ids, "offsets": offsets, "labels": labels[splits == split]}
        vocabulary = tokenizer.finish({split: arrays[split]["tokens"] for split in SPLITS})
        meta = {
            "kind": self.kind,
            "classes": classes,
            "vocabulary": vocabulary,
            "tokenizer": tokenizer.settings,
            "duplicates": equal_digests({split: tokens[split].digests for split in SPLITS}),
        }
        facts = {split: examples.facts(splits == split) for split in SPLITS}
        return Packed(arrays, meta, examples.unused, bad=examples.bad, facts=facts)

    def _tokenizer(self, archive: Path, examples: Examples, splits: np.ndarray) -> Tokenizer:
        if self.tokenizer is None:
            return Words(self.vocabulary)
        if isinstance(self.tokenizer, Pretrained):  # beside the archive
            return Subwords(subwords.read_settings(archive.with_name(subwords.FILE), SUBSTITUTIONS))
        chunks = (text for chunk in examples.texts() for text in chunk)
        train = (text for text, split in zip(chunks, splits, strict=True) if split == "train")
        return Subwords(subwords.train(train, self.vocabulary, SUBSTITUTIONS))


def fault_of(text: Any) -> str | None:
    """Why a value can't be used as a text; None: it can."""
    if not isinstance(text, str):
        return "has no text" if text is None else f"holds {text!r} in place of a text"
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    return None
