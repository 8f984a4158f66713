"""Sentences whose words have tags.

Per split: `offsets` int64 [N + 1], each sentence's first word; `documents` int32 [N], the document of each sentence; of
each word `words` int32 [W], its number in the vocabulary, `tags` int64 [W], and its letters as UTF-8: those of word i
are `text[text_offsets[i] : text_offsets[i + 1]]`, uint8, `text_offsets` int64 [W + 1]. So a tokenizer of subwords can
be applied to the words as they were written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.common.tag_schemes import Scheme, Span, scheme_of, tags_of
from src.configuration.schema import Loader, NonNegative, PositiveInt
from src.data.batching import Batches, generator
from src.data.kinds import Feed, Inputs
from src.data.kinds.text import without_middle
from src.data.packed import PADDING, UNKNOWN, Arrays

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from src.data.batching import Batch

# The words of a raw text. In this order: abbreviations (U.S., J.), numbers with their marks (1996-08-22, 3.5), words,
# also with a hyphen, an ampersand or an apostrophe inside (O'Neill, AT&T) but without an 's or 'll, and single marks.
WORD = re.compile(
    r"(?:[^\W\d_]\.){2,}|[A-Z]\.(?=\s+[A-Z])|\d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?(?!\w)"
    r"|\w+(?:(?:[-&]|['’](?!(?:s|m|d|t|ll|re|ve)\b))\w+)*|['’](?:s|m|d|t|ll|re|ve)\b|[^\w\s]",
)
SENTENCE_END = (".", "!", "?", "…")


@dataclass(frozen=True)
class Sentence:
    """Words with their entities, and the number of their document in its file."""

    words: list[str]
    spans: list[Span]
    document: int = 0


@dataclass(frozen=True)
class Token:
    """A word of a raw text and where it stands: `text[start:end]`."""

    word: str
    start: int
    end: int


class TaggedLoader(Loader):
    """Batches of sentences of like length."""

    max_words: PositiveInt | None = Field(
        default=None, description="a longer training sentence loses its end, and the tags there; null: none is cut"
    )
    max_characters: PositiveInt = Field(
        default=20, description="bytes of UTF-8 of a word that its characters are; a longer word loses its middle"
    )
    word_dropout: NonNegative = Field(
        default=0.0,
        description="a: a word that occurs n times in the training part becomes <unk> with the probability a / (a + n)",
    )


class TaggedBatches(Batches):
    """(words int64 [B, T], characters int64 [B, T, C], lengths int64 [B], tags int64 [B, T]).

    T is the longest sentence of the batch, C the longest word. Characters are bytes of UTF-8. Padding is `<pad>`, 0 and
    the tag 0. As with texts, batches hold sentences of like length.
    """

    STRETCH = 50
    loader: TaggedLoader

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        import torch

        self.offsets = self.split["offsets"]  # on the CPU, which needs a batch's lengths to know its shape
        sizes = self.split["text_offsets"].diff().numpy()
        self.longest_words = torch.from_numpy(np.maximum.reduceat(sizes, self.offsets[:-1].numpy()))
        counts = torch.bincount(self.split["words"], minlength=len(self.meta["vocabulary"]))
        self.dropped = self.loader.word_dropout / (self.loader.word_dropout + counts.clamp(min=1))

    def order(self) -> list[Tensor]:
        import torch

        lengths = self.offsets.diff()
        if not self.train:
            return self._cut(lengths.argsort(stable=True))
        random = generator(self.seed, "order", self.epoch)
        shuffled = torch.randperm(len(lengths), generator=random)[: len(self) * self.size]
        stretches = shuffled.split(self.STRETCH * self.size)
        batches = [batch for s in stretches for batch in s[lengths[s].argsort(stable=True)].split(self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=random)]

    def collate(self, indices: Tensor, index: int) -> Batch:
        import torch

        words, device = self.split["words"], self.split["words"].device
        start, lengths = self.offsets[indices], self.offsets[indices + 1] - self.offsets[indices]
        if self.train:
            lengths = lengths.clamp(max=self.loader.max_words or sys.maxsize)
        longest = int(lengths.max())
        size = min(int(self.longest_words[indices].max()), self.loader.max_characters)
        start, lengths = (values.to(device, non_blocking=True) for values in (start, lengths))

        position = torch.arange(longest, device=device)[None, :]
        is_word = position < lengths[:, None]
        at = torch.where(is_word, start[:, None] + position, 0)  # of each word in the split: [B, T]
        numbers = words[at].long()
        if self.train and self.loader.word_dropout:
            random = torch.rand(numbers.shape, generator=generator(self.seed, "words", self.epoch, index))
            is_dropped = random.to(device, non_blocking=True) < self.dropped[numbers]
            numbers = numbers.masked_fill(is_dropped, self.meta["vocabulary"].index(UNKNOWN))

        first = self.split["text_offsets"][at]
        full_sizes = (self.split["text_offsets"][at + 1] - first)[..., None]
        sizes = full_sizes.clamp(max=size)
        byte = torch.arange(size, device=device)
        is_byte = is_word[..., None] & (byte < sizes)
        source = first[..., None] + without_middle(byte, full_sizes, sizes)
        characters = self.split["text"][torch.where(is_byte, source, 0)].long() * is_byte
        return (
            numbers.masked_fill(~is_word, self.meta["vocabulary"].index(PADDING)),
            characters,
            lengths,
            self.split["tags"][at] * is_word,
        )

    def to(self, device: torch.device) -> Batches:
        """Moves the split; the offsets that shapes depend on stay on the CPU as well."""
        super().to(device)
        self.dropped = self.dropped.to(self.split["words"].device)
        return self


def arrays_of(sentences: Sequence[Sentence], tags: Sequence[str], vocabulary: Mapping[str, int]) -> Arrays:
    """Sentences as a split's arrays; `vocabulary` numbers normalised words."""
    scheme: Scheme = scheme_of(tags)
    ids = {tag: number for number, tag in enumerate(tags)}
    words = [word for sentence in sentences for word in sentence.words]
    encoded = [word.encode() for word in words]
    return {
        "offsets": np.cumsum([0, *(len(sentence.words) for sentence in sentences)], dtype=np.int64),
        "documents": np.array([sentence.document for sentence in sentences], np.int32),
        "words": np.array([vocabulary.get(normalised(word), 0) for word in words], np.int32),
        "tags": np.array([ids[tag] for s in sentences for tag in tags_of(s.spans, len(s.words), scheme)], np.int64),
        "text": np.frombuffer(b"".join(encoded), np.uint8),
        "text_offsets": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    }


def words_of(split: Mapping[str, Tensor], index: int) -> list[str]:
    """The words of a sentence as they were written."""
    first, last = split["offsets"][index : index + 2].tolist()
    borders = split["text_offsets"][first : last + 1].tolist()
    text = split["text"][borders[0] : borders[-1]].cpu().numpy().tobytes()
    return [text[a - borders[0] : b - borders[0]].decode() for a, b in pairwise(borders)]


def normalised(word: str) -> str:
    """A word as the vocabulary has it: in lower case, each digit a 0."""
    return re.sub(r"\d", "0", word.lower())


def tokenize(text: str) -> list[Token]:
    """The words of a raw text, as `WORD` finds them; blanks alone are in none."""
    return [Token(match.group(), *match.span()) for match in WORD.finditer(text)]


def sentences_of(text: str) -> list[list[Token]]:
    """The sentences of a raw text.

    One ends with a full stop, an exclamation or a question mark that stands before a blank and no lower-case letter,
    closing quotation marks and brackets included, and with an empty line.
    """
    tokens = tokenize(text)
    sentences: list[list[Token]] = [tokens[:1]]
    for token, following in pairwise(tokens):
        gap = text[token.end : following.start]
        ending = next((t.word for t in reversed(sentences[-1]) if t.word not in "\"'”’)]»"), "")
        is_end = ending in SENTENCE_END and bool(gap) and not following.word[0].islower()
        if is_end or gap.count("\n") > 1:
            sentences.append([])
        sentences[-1].append(following)
    return sentences if tokens else []


def text_of(source: str | None, signature: Mapping[str, Any]) -> str:
    """The text that a caller gives, or that of the file that he names.

    Raises:
        Failure: there is none, or no such file.
    """
    if source is None:
        raise Failure(f"no input: {signature['name']} wants a text")
    path = Path(source)
    is_file = len(source) < 250 and path.is_file()  # the system refuses to look for longer names
    if not is_file and re.fullmatch(r"\S+\.txt", source):
        raise Failure(f"{source}: no such file")
    # Decoded from bytes: each line's end counts as many characters as it has in the file.
    return path.read_bytes().decode("utf-8-sig", errors="replace") if is_file else source


def feed_of(sentences: Sequence[Sequence[str]], vocabulary: Sequence[str], max_characters: int) -> Feed:
    """Sentences of words as the graph's inputs."""
    ids = {word: number for number, word in enumerate(vocabulary)}
    encoded = [[word.encode() for word in words] for words in sentences]
    size = min(max(len(word) for words in encoded for word in words), max_characters)
    lengths = np.array([len(words) for words in sentences], np.int64)
    shape = len(sentences), int(lengths.max())
    feed = {
        "words": np.full(shape, ids[PADDING], np.int64),
        "characters": np.zeros((*shape, size), np.int64),
        "lengths": lengths,
    }
    for row, words in enumerate(sentences):
        feed["words"][row, : len(words)] = [ids.get(normalised(word), 0) for word in words]
        for column, word in enumerate(encoded[row]):
            kept = min(len(word), size)
            letters = np.frombuffer(word, np.uint8)[without_middle(np.arange(kept), len(word), kept)]
            feed["characters"][row, column, :kept] = letters
    return feed


def _trimmed(words: Tensor, characters: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Sentences without the padding that all of them share."""
    longest, size = int(lengths.max()), max(1, int((characters > 0).sum(2).max()))
    return words[:, :longest], characters[:, :longest, :size], lengths


def _padded(feeds: Sequence[Feed]) -> Feed:
    """Sentences of several lengths as one feed; what stands behind a sentence's length has no effect."""
    rows = sum(len(feed["lengths"]) for feed in feeds)
    longest, size = (max(feed["characters"].shape[axis] for feed in feeds) for axis in (1, 2))
    joined = {
        "words": np.zeros((rows, longest), np.int64),
        "characters": np.zeros((rows, longest, size), np.int64),
        "lengths": np.concatenate([feed["lengths"] for feed in feeds]),
    }
    row = 0
    for feed in feeds:
        count, length, width = feed["characters"].shape
        joined["words"][row : row + count, :length] = feed["words"]
        joined["characters"][row : row + count, :length, :width] = feed["characters"]
        row += count
    return joined


class Tagged:
    """The kind of sentences whose words have tags."""

    options = TaggedLoader
    batches = TaggedBatches
    inputs = Inputs(
        ("words", "characters", "lengths"),
        ({0: "batch", 1: "time"}, {0: "batch", 1: "time", 2: "letters"}, {0: "batch"}),
        _trimmed,
        _padded,
    )
    suffixes = (".txt",)
    example_argument = '"My name is Wolff. I live in Berlin"'
    hub_prefix = "token"

    def count(self, arrays: Mapping[str, Any]) -> int:
        return len(arrays["documents"])

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """A text, or a text file, sentence by sentence: `words` [S, T], `characters` [S, T, C], `lengths` [S]."""
        sentences = sentences_of(text_of(source, signature))
        if not sentences:
            raise Failure("the text has no word in it")
        words = [[token.word for token in sentence] for sentence in sentences]
        return feed_of(words, signature["vocabulary"], signature["max_characters"])

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> list[str]:
        """Sentences, a blank between two words."""
        return [" ".join(words_of(split, index)) for index in indices]

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        assert isinstance(loader, TaggedLoader)
        return {"max_characters": loader.max_characters} | {key: meta[key] for key in ("tags", "vocabulary")}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return """\
# Numbers from the vocabulary beside the model, where words are in lower case and each digit is a 0:
words = np.array([[12, 7, 345, 2]], dtype=np.int64)  # [batch, time]
letters = [word.encode() for word in ("Peter", "lives", "here", ".")]
characters = np.array([[list(word.ljust(5, b"\\0")) for word in letters]], dtype=np.int64)  # [batch, time, bytes]
lengths = np.array([4], dtype=np.int64)  # [batch]: words in each sentence, the rest is padding
"""


KIND = Tagged()
