"""Texts in folders named after their classes, aclImdb's layout `{train,test}/{pos,neg}/*.txt`, as tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from src.common.hardware import cores
from src.configuration.schema import PositiveInt, Pretrained, SplitSeed, ValFraction
from src.data import subwords
from src.data.fetching.files import SourceError
from src.data.folders import read_folders
from src.data.packed import PADDING, SPLITS, UNKNOWN, Arrays, Packed, duplicates, stratified_holdout

UNLABELLED = {"unsup": "without a label"}  # the folder of aclImdb
BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


class ReviewFolders:
    """Reads a folder or an archive of class folders of texts.

    Tokenizes with torchtext's `basic_english`; the vocabulary is the `vocabulary` most frequent tokens of the training
    part, after `<unk>` and `<pad>`. Or into the subwords of a text encoder, by its `tokenizer` and with its vocabulary.
    """

    kind = "text"
    archive_name = "aclImdb_v1.tar.gz"
    sample: ClassVar[str] = "src.data.samples.reviews"

    def __init__(
        self,
        *,
        vocabulary: PositiveInt = 25000,
        tokenizer: Pretrained | None = None,
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and tokenizes the archive.

        Raises:
            SourceError: a folder is missing, or a file is not UTF-8 or empty.
        """
        folders = read_folders(archive, _text, (".txt",), left_out=UNLABELLED)
        classes = folders.classes(archive, "*.txt in it")
        settings = self._subword_settings(archive) if self.tokenizer else None
        parts: dict[str, tuple[list[Any], np.ndarray]] = {
            split: (
                _encoded([example.content for example in folders.examples[split]], settings),
                np.array([classes.index(example.label) for example in folders.examples[split]]),
            )
            for split in SPLITS
        }
        if not folders.examples["val"]:
            tokens, labels = parts["train"]
            for split, indices in zip(
                ("train", "val"), stratified_holdout(labels, self.val_fraction, self.split_seed), strict=True
            ):
                parts[split] = [tokens[i] for i in indices], labels[indices]
        vocabulary = subwords.vocabulary(settings) if settings else self._vocabulary(parts["train"][0])
        meta = {
            "kind": self.kind,
            "classes": classes,
            "vocabulary": vocabulary,
            "tokenizer": settings or tokenizer_settings(),
            "duplicates": duplicates(
                {k: [" ".join(map(str, example)).encode() for example in x] for k, (x, _) in parts.items()}
            ),
        }
        ids = {} if settings else {token: number for number, token in enumerate(vocabulary)}
        splits = {split: _flat(examples, y, ids) for split, (examples, y) in parts.items()}
        return Packed(splits, meta, folders.unused)

    def _subword_settings(self, archive: Path) -> dict[str, Any]:
        """The tokenizer beside the archive."""
        return subwords.read_settings(archive.with_name(subwords.FILE), [(f"(?i){BREAK.pattern}", " ")])

    def _vocabulary(self, train: Iterable[Iterable[str]]) -> list[str]:
        """The most frequent tokens of the training part, after two that stand for others."""
        from torchtext.vocab import Vocab

        counts = Counter(token for example in train for token in example)
        return list(Vocab(counts, max_size=self.vocabulary, specials=[UNKNOWN, PADDING]).itos)


def _text(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8 (byte {error.start}): convert or remove it") from None
    if not text.strip():
        raise SourceError(f"{name} is empty: remove it")
    return text


def _encoded(texts: list[str], settings: Mapping[str, Any] | None) -> list[Any]:
    """The tokens of each text: words, or the ids of subwords by their tokenizer's `settings`."""
    return subwords.encode(texts, settings) if settings else tokenize(texts)


def _flat(examples: list[Any], labels: np.ndarray, ids: Mapping[str, int]) -> Arrays:
    """The ids of all examples in one array, the offset of every example in it, and the labels.

    `ids`: of words; without them the examples hold ids.
    """
    flat = [ids.get(token, 0) if ids else token for example in examples for token in example]
    offsets = np.cumsum([0, *(len(example) for example in examples)])
    return {"tokens": np.array(flat, np.int32), "offsets": offsets.astype(np.int64), "labels": labels.astype(np.int64)}


def tokenizer_settings() -> dict[str, object]:
    """`basic_english` as data: lower-case, then these substitutions in order, then split at blanks.

    With it an exported model is used without torchtext, which imports torch. The rules are private to torchtext's
    `basic_english` (`utils._patterns` and `_replacements`, checked with 0.6.0).
    """
    from torchtext.data import utils

    rules = [(BREAK.pattern, " "), *zip(utils._patterns, utils._replacements, strict=True)]
    return {"name": "basic_english", "lowercase": True, "substitutions": [list(rule) for rule in rules]}


def tokenize(texts: list[str]) -> list[list[str]]:
    """Lower-cased tokens of each text, HTML breaks removed; on all cores if there are at least 2,000 texts."""
    chunk = 1000
    if len(texts) < 2 * chunk:
        return _tokenize(texts)
    chunks = [texts[i : i + chunk] for i in range(0, len(texts), chunk)]
    # fork: the workers inherit the imported torchtext instead of importing torch again.
    with ProcessPoolExecutor(cores(), mp_context=get_context("fork")) as pool:
        return [tokens for part in pool.map(_tokenize, chunks) for tokens in part]


def _tokenize(texts: Iterable[str]) -> list[list[str]]:
    from torchtext.data.utils import get_tokenizer

    tokenizer = get_tokenizer("basic_english")
    # A review without any token (breaks, brackets) becomes one unknown token, so that its label stays.
    return [tokenizer(BREAK.sub(" ", text)) or [UNKNOWN] for text in texts]
