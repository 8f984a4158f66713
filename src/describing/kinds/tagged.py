"""Sentences whose words have tags: entities by type, lengths, unknown words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from src.common.tag_schemes import OUTSIDE, parts_of
from src.data.packed import UNKNOWN
from src.describing import MEMBERS, Examined, chosen
from src.describing.digests import digest
from src.describing.kinds.text import count_tokens, excerpt, in_vocabulary, unknown_tokens, words_in
from src.describing.stored import StoredArray, StoredSplit


class Tagged:
    """How tagged sentences are measured and shown."""

    noun, counted = "sentences", "entities"
    label, has_one_class = "entity", False
    fitted: tuple[str, ...] = ("unknown",)
    titles: Mapping[str, str] = {
        "length": "length of a sentence in words",
        "unknown": "words of a sentence that the vocabulary lacks, per cent",
        "entities": "entities in a sentence",
        "entity length": "length of an entity in words",
    }

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        offsets, tags = split["offsets"][:], split["tags"][:]
        vocabulary = (other or meta)["vocabulary"]
        words: StoredArray | np.ndarray = split["words"]
        if vocabulary != meta["vocabulary"]:
            words = in_vocabulary(meta["vocabulary"], vocabulary)[words[:]]
        counted = count_tokens(words, offsets, len(vocabulary), vocabulary.index(UNKNOWN))
        starts, kinds, lengths = entities(tags, offsets, meta)
        owners = np.searchsorted(offsets, starts, "right") - 1
        borders, text = split["text_offsets"][:][offsets], split["text"]
        members = {name: np.unique(owners[kinds == number]) for number, name in enumerate(meta["classes"])}
        return Examined(
            digests=digest([text[a:b].tobytes() for a, b in pairwise(borders.tolist())]),
            numbers=counted.numbers
            | {
                "entities": np.bincount(owners, minlength=len(offsets) - 1).astype(np.float32),
                "entity length": lengths.astype(np.float32),
            },
            categories={
                self.label: {
                    name: int(count)
                    for name, count in zip(
                        meta["classes"], np.bincount(kinds, minlength=len(meta["classes"])), strict=True
                    )
                },
                "word": words_in(counted.texts, vocabulary),
            },
            answers=digest([tags[a:b] for a, b in pairwise(offsets.tolist())]),
            members={name: rows[chosen(len(rows), MEMBERS)] for name, rows in members.items()},
            figures={"documents": len(np.unique(split["documents"][:])), "entities": len(starts), **counted.figures},
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        """Sentences with their entities in brackets."""
        texts = []
        for row in rows:
            first, last = split["offsets"][row : row + 2].tolist()
            borders = split["text_offsets"][first : last + 1]
            content = split["text"][borders[0] : borders[-1]].tobytes()
            words = [content[a - borders[0] : b - borders[0]].decode() for a, b in pairwise(borders.tolist())]
            starts, kinds, lengths = entities(split["tags"][first:last], np.array([0, last - first]), meta)
            for start, kind, length in zip(starts, kinds, lengths, strict=True):
                words[start] = f"[{meta['classes'][kind]}: {words[start]}"
                words[start + length - 1] += "]"
            texts.append(excerpt(" ".join(words)))
        return texts

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        return unknown_tokens(splits)


def entities(tags: np.ndarray, offsets: np.ndarray, meta: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    """The entities in tags, int [W], of sentences: first words, types and lengths in words, int64 [E] each.

    The tags are valid in IOB2 or IOBES, in which an entity begins with B or S and goes on with I and E.
    """
    parts = [parts_of(tag) for tag in meta["tags"]]
    begins = np.array([prefix in ("B", "S") for prefix, _ in parts])
    inside = np.array([prefix != OUTSIDE for prefix, _ in parts])
    types = np.array([meta["classes"].index(name) if name else -1 for _, name in parts])
    starts = np.flatnonzero(begins[tags])
    ends = np.flatnonzero(np.append(begins[tags] | ~inside[tags], True))  # where an entity can't go on
    ends = np.union1d(ends, offsets)
    return starts, types[tags[starts]], ends[np.searchsorted(ends, starts, "right")] - starts


DESCRIPTION = Tagged()
