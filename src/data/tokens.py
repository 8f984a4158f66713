"""Texts as ids, tokenized in chunks on all cores: the tokens of a data set exist only as int32 in files."""

from __future__ import annotations

import hashlib
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from src.common.hardware import cores
from src.common.ordered import in_order
from src.data import subwords
from src.data.fetching.files import disk_errors
from src.data.packed import DIGEST_BYTES, PADDING, UNKNOWN

T = TypeVar("T")
BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)  # of web pages, as in aclImdb
CHUNK = 1000  # texts that a process tokenizes at a time


class Tokens:
    """The texts of a split, one after the other; their ids are in a file without a name in `folder`, not in memory."""

    def __init__(self, folder: Path) -> None:
        self.digests: list[bytes] = []  # of each text's tokens
        self._lengths: list[np.ndarray] = []  # int64, of chunks
        self._folder = folder
        with disk_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this object)

    def add(self, ids: np.ndarray, lengths: np.ndarray, digests: Iterable[bytes]) -> None:
        """Adds texts: their ids, int32, one after the other, and the number of each one's."""
        with disk_errors(self._folder):
            self._file.write(ids.data)
        self._lengths.append(lengths)
        self.digests += digests

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids int32 [sum of lengths], mapped from the file, and the offset of every text in them, int64 [N + 1]."""
        offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]))
        with disk_errors(self._folder):
            self._file.flush()
        return np.memmap(self._file, np.int32, "r+", shape=(int(offsets[-1]),)), offsets


class Tokenizer(Protocol):
    """A way to tokenize; its ids are final after `finish`."""

    settings: Mapping[str, Any]  # as meta.json keeps them

    def encode(self, chunks: Iterable[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray, list[bytes]]]:
        """The ids, int32, the lengths, int64, and the digests of the texts of each chunk."""
        ...

    def finish(self, splits: Mapping[str, np.ndarray]) -> list[str]:
        """Replaces the ids that `encode` gave by those of the vocabulary, in place; returns the vocabulary."""
        ...


def encode(tokenizer: Tokenizer, chunks: Iterable[list[str]], splits: np.ndarray, folder: Path) -> dict[str, Tokens]:
    """Tokenizes texts and gives each to its split; `splits`: the name of each text's.

    Temporary files are in `folder`.
    """
    tokens = {str(split): Tokens(folder) for split in np.unique(splits)}
    start = 0
    for ids, lengths, digests in tokenizer.encode(chunks):
        names = splits[start : start + len(lengths)]
        start += len(lengths)
        for split in set(names.tolist()):
            rows = names == split
            chosen = ids if rows.all() else ids[np.repeat(rows, lengths)]
            tokens[split].add(chosen, lengths[rows], [digests[row] for row in np.flatnonzero(rows)])
    return tokens


class Words:
    """torchtext's `basic_english`; the vocabulary is the most frequent words of train, after `<unk>` and `<pad>`."""

    def __init__(self, vocabulary: int) -> None:
        self.size = vocabulary
        self.settings: Mapping[str, Any] = basic_english()
        self._number: dict[str, int] = {}  # of each word in the order of its first occurrence

    def encode(self, chunks: Iterable[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray, list[bytes]]]:
        for words, ids, lengths, digests in in_processes(_count, chunks):
            number = [self._number.setdefault(word, len(self._number)) for word in words]
            yield np.array(number, np.int32)[ids], lengths, digests

    def finish(self, splits: Mapping[str, np.ndarray]) -> list[str]:
        from torchtext.vocab import Vocab

        counts = np.bincount(splits["train"], minlength=len(self._number)).tolist()
        counter = Counter({word: count for word, count in zip(self._number, counts, strict=True) if count})
        vocabulary = list(Vocab(counter, max_size=self.size, specials=[UNKNOWN, PADDING]).itos)
        ids = {word: number for number, word in enumerate(vocabulary)}
        final = np.array([ids.get(word, 0) for word in self._number], np.int32)
        for tokens in splits.values():
            for start in range(0, len(tokens), 1 << 20):
                tokens[start : start + (1 << 20)] = final[tokens[start : start + (1 << 20)]]
        return vocabulary


class Subwords:
    """The subwords of a tokenizer, by its settings as in src/data/subwords.py."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def encode(self, chunks: Iterable[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray, list[bytes]]]:
        for texts in chunks:
            ids = [np.array(pieces, np.int32) for pieces in subwords.encode(texts, self.settings)]
            digests = [_digest(pieces.tobytes()) for pieces in ids]
            yield np.concatenate(ids), np.array([len(pieces) for pieces in ids], np.int64), digests

    def finish(self, splits: Mapping[str, np.ndarray]) -> list[str]:
        return subwords.vocabulary(self.settings)


def in_processes(function: Callable[[list[str]], T], chunks: Iterable[list[str]]) -> Iterator[T]:
    """`map` on all cores, in order; a few chunks are read ahead. A single chunk stays in this process."""
    chunks = iter(chunks)
    ahead = list(itertools.islice(chunks, 2))
    if len(ahead) < 2:
        yield from map(function, ahead)
        return
    # fork: the workers inherit the imported torchtext instead of importing torch again.
    with ProcessPoolExecutor(cores(), mp_context=get_context("fork")) as pool:
        yield from in_order(lambda chunk: pool.submit(function, chunk), itertools.chain(ahead, chunks), 2 * cores())


def _count(texts: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray, list[bytes]]:
    """The distinct words of some texts, each text's words as numbers into them, its length and its digest."""
    number: dict[str, int] = {}
    ids: list[int] = []
    lengths, digests = [], []
    for words in tokenize(texts):
        ids += [number.setdefault(word, len(number)) for word in words]
        lengths.append(len(words))
        digests.append(_digest(" ".join(words).encode()))
    return list(number), np.array(ids, np.int32), np.array(lengths, np.int64), digests


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def tokenize(texts: Iterable[str]) -> list[list[str]]:
    """The lower-cased words of each text, HTML breaks removed.

    A text without any (breaks, brackets) becomes one unknown word, so that its label stays.
    """
    from torchtext.data.utils import get_tokenizer

    tokenizer = get_tokenizer("basic_english")
    return [tokenizer(BREAK.sub(" ", text)) or [UNKNOWN] for text in texts]


def basic_english() -> dict[str, object]:
    """`basic_english` as data: lower-case, then these substitutions in order, then split at blanks.

    With it an exported model is used without torchtext, which imports torch. The rules are private to torchtext's
    `basic_english` (`utils._patterns` and `_replacements`, checked with 0.6.0).
    """
    from torchtext.data import utils

    rules = [(BREAK.pattern, " "), *zip(utils._patterns, utils._replacements, strict=True)]
    return {"name": "basic_english", "lowercase": True, "substitutions": [list(rule) for rule in rules]}
