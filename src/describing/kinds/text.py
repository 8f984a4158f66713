"""Labelled texts: lengths, unknown tokens, vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    def examine(self, split: StoredSplit, meta: Mapping[str, Any]) -> Examined:
        tokenizer, vocabulary = meta.get("tokenizer", {}), meta["vocabulary"]
        is_subwords = tokenizer.get("name") == subwords.NAME
        unknown = tokenizer["unknown"] if is_subwords else vocabulary.index(UNKNOWN)
        labels = split["labels"][:]
        counted = count_tokens(split["tokens"], split["offsets"][:], len(vocabulary), unknown)
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
            if meta.get("tokenizer", {}).get("name") == subwords.NAME:
                text = subwords.decode(tokens, meta["tokenizer"])
            else:
                text = " ".join(meta["vocabulary"][token] for token in tokens)
            texts.append(excerpt(text))
        return texts

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        return unknown_tokens(splits)


@dataclass(frozen=True)
class Counted:
    """What `count_tokens` counts: of each text, and of each token of the vocabulary the `texts` that have it."""

    digests: np.ndarray
    numbers: dict[str, np.ndarray]
    texts: np.ndarray  # int64 [V]
    figures: dict[str, float]


def count_tokens(tokens: StoredArray, offsets: np.ndarray, size: int, unknown: int) -> Counted:
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
        digests.append(digest([ids[a:b] for a, b in zip(borders[:-1], borders[1:], strict=True)]))
    known = occurrences > 0
    known[unknown] = False
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
            "words of the vocabulary in use": int(known.sum()),
            "words that occur once": int((occurrences[known] == 1).sum()),
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
