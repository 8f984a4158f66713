"""Labelled texts: lengths, unknown tokens, vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from src.data import subwords
from src.data.packed import PADDING, UNKNOWN
from src.describing import MEMBERS, Examined, class_counts, class_members
from src.describing.digests import digest
from src.describing.stored import StoredArray, StoredSplit

TOKENS = 2**20  # that are read at once
UNKNOWN_SHARE = 0.05  # from which on a test split's unknown tokens are worth a warning
EXCERPT = 280  # characters of a text that are shown


class Text:
    """How labelled texts are measured and shown."""

    noun = counted = "texts"
    label, has_one_class = "class", True
    fitted: tuple[str, ...] = ("unknown",)
    titles: Mapping[str, str] = {
        "length": "length of a text in tokens",
        "unknown": "tokens of a text that the vocabulary lacks, per cent",
    }

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        other = meta if other is None else other
        vocabulary, labels = other["vocabulary"], split["labels"][:]
        tokens, offsets = _tokens(split, meta, other)
        counted = count_tokens(tokens, offsets, len(vocabulary), _unknown(other))
        return Examined(
            digests=counted.digests,
            numbers=counted.numbers,
            categories={
                self.label: class_counts(labels, meta["classes"]),
                "word": words_in(counted.texts, vocabulary),
            },
            answers=labels.astype(np.uint64),
            members=class_members(labels, meta["classes"], MEMBERS),
            figures=counted.figures,
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        texts = []
        for row in rows:
            first, last = split["offsets"][row : row + 2].tolist()
            tokens = split["tokens"][first:last].tolist()
            if _is_subwords(meta):
                text = subwords.decode(tokens, meta["tokenizer"])
            else:
                text = " ".join(meta["vocabulary"][token] for token in tokens)
            texts.append(excerpt(text))
        return texts

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        return unknown_tokens(splits)


def _is_subwords(meta: Mapping[str, Any]) -> bool:
    return bool(meta.get("tokenizer", {}).get("name") == subwords.NAME)


def _unknown(meta: Mapping[str, Any]) -> int:
    """The id of what the vocabulary lacks."""
    return int(meta["tokenizer"]["unknown"] if _is_subwords(meta) else meta["vocabulary"].index(UNKNOWN))


def _tokens(
    split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[StoredArray | np.ndarray, np.ndarray]:
    """The tokens of a split in the vocabulary of `other`, and the offsets of its texts."""
    tokens, offsets = split["tokens"], split["offsets"][:]
    if other["vocabulary"] == meta["vocabulary"]:
        return tokens, offsets
    if not _is_subwords(meta):
        return in_vocabulary(meta["vocabulary"], other["vocabulary"])[tokens[:]], offsets
    texts = [subwords.decode(tokens[a:b].tolist(), meta["tokenizer"]) for a, b in pairwise(offsets.tolist())]
    ids = subwords.encode(texts, other["tokenizer"])
    return np.array([i for text in ids for i in text]), np.cumsum([0, *map(len, ids)])


def in_vocabulary(words: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """The ids of words in another vocabulary, int64 [V]; of those that it lacks the id of `<unk>`."""
    ids = {word: number for number, word in enumerate(other)}
    return np.array([ids.get(word, ids[UNKNOWN]) for word in words])


@dataclass(frozen=True)
class Counted:
    """What `count_tokens` counts: of each text, and of each token of the vocabulary the `texts` that have it."""

    digests: np.ndarray
    numbers: dict[str, np.ndarray]
    texts: np.ndarray  # int64 [V]
    figures: dict[str, float]


def count_tokens(tokens: StoredArray | np.ndarray, offsets: np.ndarray, size: int, unknown: int) -> Counted:
    """Counts the tokens of texts, text by text.

    Args:
        tokens: ids int32 [T].
        offsets: int64 [N + 1], the first token of each text.
        size: of the vocabulary.
        unknown: the id of what it lacks.
    """
    lengths = np.diff(offsets)
    missing = np.zeros(len(lengths), np.int64)
    texts, occurrences = np.zeros(size, np.int64), np.zeros(size, np.int64)
    digests = []
    for first, last in _runs(offsets):
        ids = tokens[offsets[first] : offsets[last]]
        borders = offsets[first : last + 1] - offsets[first]
        owners = np.repeat(np.arange(last - first), np.diff(borders))
        occurrences += np.bincount(ids, minlength=size)
        texts += np.bincount(np.unique(owners * size + ids) % size, minlength=size)
        missing[first:last] = np.bincount(owners[ids == unknown], minlength=last - first)
        digests.append(digest([ids[a:b] for a, b in pairwise(borders)]))
    is_used = occurrences > 0
    is_used[unknown] = False
    return Counted(
        np.concatenate(digests),
        {
            "length": lengths.astype(np.float32),
            "unknown": (100 * missing / np.maximum(lengths, 1)).astype(np.float32),
        },
        texts,
        {
            "tokens": int(lengths.sum()),
            "unknown tokens, per cent": 100 * float(missing.sum()) / max(1, int(lengths.sum())),
            "words of the vocabulary in use": int(is_used.sum()),
            "words that occur once": int((occurrences[is_used] == 1).sum()),
            "vocabulary": size,
        },
    )


def _runs(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of texts, from the first to before the last, of about `TOKENS` tokens."""
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + TOKENS, "right")) - 1)
        yield first, last
        first = last


def words_in(texts: np.ndarray, vocabulary: Sequence[str]) -> dict[str, int]:
    """The number of texts with each word, the most frequent word first, without the words that stand for others."""
    order = np.argsort(-texts, kind="stable")
    return {vocabulary[i]: int(texts[i]) for i in order if texts[i] and vocabulary[i] not in (UNKNOWN, PADDING)}


def unknown_tokens(splits: Mapping[str, Examined]) -> list[str]:
    """A warning of splits with many tokens that the vocabulary lacks."""
    shares = {split: examined.figures["unknown tokens, per cent"] for split, examined in splits.items()}
    where = [f"{share:.1f} % of {split}" for split, share in shares.items() if share > 100 * UNKNOWN_SHARE]
    if not where:
        return []
    return [f"the vocabulary lacks {', '.join(where)}'s tokens; raise data.vocabulary, or use subwords"]


def excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else f"{line[:EXCERPT].rpartition(' ')[0] or line[:EXCERPT]} …"


DESCRIPTION = Text()
