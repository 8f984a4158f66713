"""Tagged sentences whose words are also cut into the subwords of a text encoder.

Beside the arrays of tagged sentences: `pieces` int32 [P], ids of the encoder's, and `piece_offsets` int64 [W + 1], the
first piece of each word; a word has at least one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.configuration.schema import Loader, PositiveInt
from src.data import subwords
from src.data.kinds import Feed, Inputs
from src.data.kinds.tagged import Tagged, TaggedBatches, TaggedLoader, feed_of, sentences_of, text_of
from src.data.kinds.text import surround
from src.data.packed import Arrays

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batch


class SubwordLoader(TaggedLoader):
    """Batches of sentences of like length, for an encoder of subwords."""

    max_pieces: PositiveInt = Field(
        default=256,
        description="subwords of a sentence, with those that the encoder puts around it; of a longer sentence the last "
        "words have no subwords of their own, but their characters and their tags",
    )


class SubwordBatches(TaggedBatches):
    """(pieces int64 [B, P], piece_lengths int64 [B], firsts int64 [B, T], characters, lengths, tags).

    `firsts` says which piece is the first one of each word, 0 behind a sentence's end; a word without a piece of its
    own has the sentence's last one. The others as in `TaggedBatches`.
    """

    loader: SubwordLoader

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.piece_offsets = self.split["piece_offsets"]  # on the CPU, as the sentences' offsets
        self.longest = longest_text(self.meta["tokenizer"], self.loader.max_pieces)

    def collate(self, indices: Tensor, index: int) -> Batch:
        import torch

        _, characters, lengths, tags = super().collate(indices, index)
        device = tags.device
        first_word, last_word = self.offsets[indices], self.offsets[indices + 1]
        if self.train and self.loader.max_words:
            last_word = last_word.minimum(first_word + self.loader.max_words)
        first = self.piece_offsets[first_word]
        counts = (self.piece_offsets[last_word] - first).clamp(max=self.longest)
        position = torch.arange(int(counts.max()), device=device)
        first_word, first, counts = (
            values[:, None].to(device, non_blocking=True) for values in (first_word, first, counts)
        )
        is_piece = position < counts
        pieces = self.split["pieces"][torch.where(is_piece, first + position, 0)].long()
        pieces = pieces.masked_fill(~is_piece, self.meta["tokenizer"]["padding"])
        pieces, piece_lengths = surround(pieces, counts[:, 0], self.meta["tokenizer"])

        word = torch.arange(tags.shape[1], device=device)
        is_word = word < lengths[:, None]
        firsts = self.split["piece_offsets"][torch.where(is_word, first_word + word, first_word)] - first
        firsts = (firsts.minimum(counts - 1) + len(self.meta["tokenizer"]["begin"])) * is_word
        return pieces, piece_lengths, firsts, characters, lengths, tags


def longest_text(tokenizer: Mapping[str, Any], limit: int) -> int:
    """How many pieces of its own a sentence may have.

    Raises:
        Failure: none.
    """
    longest = limit - len(tokenizer["begin"]) - len(tokenizer["end"])
    if longest < 1:
        raise Failure(f"data.loader.max_pieces: {limit} leaves no room for a sentence; give more")
    return longest


def pieces_of(words: Sequence[str], tokenizer: Mapping[str, Any]) -> list[list[int]]:
    """The pieces of each word, as in the middle of a sentence: with a blank before it, which some encoders heed."""
    return subwords.encode([f" {word}" for word in words], tokenizer)


def with_pieces(arrays: Arrays, tokenizer: Mapping[str, Any]) -> Arrays:
    """A split's arrays with the pieces of its words."""
    text = arrays["text"].tobytes()
    words = [text[start:end].decode() for start, end in pairwise(arrays["text_offsets"].tolist())]
    unique = list(dict.fromkeys(words))
    pieces = dict(zip(unique, pieces_of(unique, tokenizer), strict=True))
    return arrays | {
        "pieces": np.array([piece for word in words for piece in pieces[word]], np.int32),
        "piece_offsets": np.cumsum([0, *(len(pieces[word]) for word in words)], dtype=np.int64),
    }


def _feed(sentences: Sequence[Sequence[str]], signature: Mapping[str, Any]) -> Feed:
    """Sentences of words as the graph's inputs."""
    base = feed_of(sentences, signature["vocabulary"], signature["max_characters"])
    tokenizer = signature["tokenizer"]
    begin, end = tokenizer["begin"], tokenizer["end"]
    longest = longest_text(tokenizer, signature["max_pieces"])
    rows, firsts = [], np.zeros(base["words"].shape, np.int64)
    for row, words in enumerate(sentences):
        pieces = pieces_of(words, tokenizer)
        starts = np.cumsum([0, *map(len, pieces[:-1])])
        own = [piece for word in pieces for piece in word][:longest]
        firsts[row, : len(words)] = np.minimum(starts, len(own) - 1) + len(begin)
        rows.append([*begin, *own, *end])
    lengths = np.array([len(row) for row in rows], np.int64)
    padded = np.full((len(rows), int(lengths.max())), tokenizer["padding"], np.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    return {
        "pieces": padded,
        "piece_lengths": lengths,
        "firsts": firsts,
        "characters": base["characters"],
        "lengths": base["lengths"],
    }


def _trimmed(
    pieces: Tensor, piece_lengths: Tensor, firsts: Tensor, characters: Tensor, lengths: Tensor
) -> tuple[Tensor, ...]:
    """Sentences without the padding that all of them share."""
    _, characters, _ = Tagged.inputs.trimmed(firsts, characters, lengths)
    firsts = firsts[:, : int(lengths.max())]
    return pieces[:, : int(piece_lengths.max())], piece_lengths, firsts, characters, lengths


def _joined(feeds: Sequence[Feed]) -> Feed:
    """Sentences of several lengths as one feed."""
    shapes = {
        name: np.max([feed[name].shape[1:] for feed in feeds], axis=0) for name in ("pieces", "firsts", "characters")
    }
    joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in ("piece_lengths", "lengths")}
    for name, shape in shapes.items():
        parts = []
        for feed in feeds:
            missing = [(0, 0), *((0, int(most - own)) for most, own in zip(shape, feed[name].shape[1:], strict=True))]
            parts.append(np.pad(feed[name], missing))
        joined[name] = np.concatenate(parts)
    return joined


class TaggedSubwords(Tagged):
    """The kind of tagged sentences for an encoder of subwords."""

    options = SubwordLoader
    batches = SubwordBatches
    inputs = Inputs(
        ("pieces", "piece_lengths", "firsts", "characters", "lengths"),
        (
            {0: "batch", 1: "pieces"},
            {0: "batch"},
            {0: "batch", 1: "time"},
            {0: "batch", 1: "time", 2: "letters"},
            {0: "batch"},
        ),
        _trimmed,
        _joined,
    )

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """A text, or a text file, sentence by sentence, as the batches' elements but for the tags."""
        sentences = sentences_of(text_of(source, signature))
        if not sentences:
            raise Failure("the text has no word in it")
        return _feed([[token.word for token in sentence] for sentence in sentences], signature)

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        assert isinstance(loader, SubwordLoader)
        return super().signature(meta, loader) | {"max_pieces": loader.max_pieces, "tokenizer": meta["tokenizer"]}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return """\
pieces = np.array([[101, 2848, 3268, 2182, 1012, 102]], dtype=np.int64)  # [batch, pieces]: subwords of the encoder
piece_lengths = np.array([6], dtype=np.int64)  # [batch]
firsts = np.array([[1, 2, 3, 4]], dtype=np.int64)  # [batch, time]: the first piece of each word
letters = [word.encode() for word in ("Peter", "lives", "here", ".")]
characters = np.array([[list(word.ljust(5, b"\\0")) for word in letters]], dtype=np.int64)  # [batch, time, bytes]
lengths = np.array([4], dtype=np.int64)  # [batch]: words in each sentence, the rest is padding
"""


KIND = TaggedSubwords()
