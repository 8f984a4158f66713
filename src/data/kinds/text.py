"""Labelled texts: `tokens` int32 [sum of lengths], `offsets` int64 [N + 1], `labels` int64 [N]."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.configuration.schema import Loader, PositiveInt, Probability
from src.data import subwords
from src.data.batching import Batches, generator
from src.data.kinds import Feed, Inputs
from src.data.packed import PADDING, UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batch


class TextLoader(Loader):
    """Batches of texts of like length."""

    max_tokens: PositiveInt | None = Field(
        default=None, description="a longer text loses its middle; null: no text is cut"
    )
    word_dropout: Probability = Field(default=0.0, description="probability that a token becomes <unk> in training")
    batch_tokens: PositiveInt | None = Field(
        default=None,
        description="tokens of a training batch, padding included, by which short texts come in larger batches than "
        "long ones, of batch_size at most; null: all batches have batch_size",
    )


class TextBatches(Batches):
    """(tokens int64 [B, T], lengths int64 [B], labels int64 [B]), T the longest of the batch.

    Batches hold texts of like length: a fresh permutation is cut into stretches of 50 batches, each sorted by length.
    With `batch_tokens` all texts are sorted by their length, changed at random by up to a tenth, and cut so that each
    batch has about as many tokens. Texts in subwords stand between the ids that their encoder puts around them.
    """

    STRETCH = 50
    loader: TextLoader
    moved = ("tokens", "labels")  # not the offsets: the CPU needs a batch's lengths to know the batch's shape

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        tokenizer = self.meta.get("tokenizer", {})
        self.around: tuple[list[int], list[int]] = tokenizer.get("begin", []), tokenizer.get("end", [])
        is_subwords = tokenizer.get("name") == subwords.NAME
        vocabulary: list[str] = self.meta["vocabulary"]
        self.padding: int = tokenizer["padding"] if is_subwords else vocabulary.index(PADDING)
        self.unknown: int = tokenizer["unknown"] if is_subwords else vocabulary.index(UNKNOWN)
        self.longest = (self.loader.max_tokens or sys.maxsize) - sum(map(len, self.around))  # of a text's own tokens
        if self.longest < 1:
            raise Failure(f"data.loader.max_tokens: {self.loader.max_tokens} leaves no room for a text; give more")

    def __len__(self) -> int:
        return len(self._sizes) if self.train and self.loader.batch_tokens else super().__len__()

    @cached_property
    def _sizes(self) -> list[int]:
        """How many texts the training batches of about `batch_tokens` tokens hold, from short texts to long ones."""
        lengths = self.split["offsets"].diff().clamp(max=self.longest).sort().values + sum(map(len, self.around))
        sizes, size = [], 0
        for length in lengths.tolist():
            if size and (size == self.size or (size + 1) * length > (self.loader.batch_tokens or 0)):
                sizes.append(size)
                size = 0
            size += 1
        shares = [max(self.world, size - size % self.world) for size in [*sizes, size]]
        return shares if sum(shares) <= self.count else shares[:-1]

    def order(self) -> list[Tensor]:
        import torch

        lengths = self.split["offsets"].diff()
        if not self.train:
            return self._cut(lengths.argsort(stable=True))
        if self.loader.batch_tokens:
            return self._order_by_tokens(lengths.clamp(max=self.longest))
        random = generator(self.seed, "order", self.epoch)
        shuffled = torch.randperm(len(lengths), generator=random)[: len(self) * self.size]
        stretches = shuffled.split(self.STRETCH * self.size)
        batches = [batch for s in stretches for batch in s[lengths[s].argsort(stable=True)].split(self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=random)]

    def _order_by_tokens(self, lengths: Tensor) -> list[Tensor]:
        import torch

        random = generator(self.seed, "order", self.epoch)
        changed = lengths * (1 + 0.1 * torch.rand(len(lengths), generator=random))
        batches = changed.argsort(stable=True)[: sum(self._sizes)].split(self._sizes)
        return [batches[i] for i in torch.randperm(len(batches), generator=random)]

    def collate(self, indices: Tensor, index: int) -> Batch:
        import torch

        offsets, tokens = self.split["offsets"], self.split["tokens"]
        start, full_lengths = offsets[indices], offsets[indices + 1] - offsets[indices]
        longest = min(int(full_lengths.max()), self.longest)
        indices, start, full_lengths = (
            values.to(tokens.device, non_blocking=True) for values in (indices, start, full_lengths)
        )
        lengths = full_lengths.clamp(max=longest)
        position = torch.arange(longest, device=tokens.device)[None, :]
        source = without_middle(position, full_lengths[:, None], lengths[:, None])
        is_token = position < lengths[:, None]
        batch = tokens[torch.where(is_token, start[:, None] + source, 0)].long()
        if self.train and self.loader.word_dropout:
            random = generator(self.seed, "words", self.epoch, index)
            dropped = torch.rand(batch.shape, generator=random) < self.loader.word_dropout
            dropped = dropped.to(tokens.device, non_blocking=True)
            batch = batch.masked_fill(dropped, self.unknown)
        batch = batch.masked_fill(~is_token, self.padding)
        if any(self.around):
            batch, lengths = surround(batch, lengths, self.meta["tokenizer"])
        return batch, lengths, self.split["labels"][indices]


def without_middle(position: Any, full_length: Any, length: Any) -> Any:
    """Where the tokens of a shortened text stand in the full one: of a text that is too long head and tail stay.

    Arrays or tensors of integers that broadcast; `position` counts from 0 within the shortened text.
    """
    return position + (position >= (length + 1) // 2) * (full_length - length)


def surround(pieces: Tensor, lengths: Tensor, tokenizer: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Texts [B, T] between the ids that belong around them, [B, T + begin + end], and their lengths [B] with these."""
    import torch

    begin, end = tokenizer["begin"], tokenizer["end"]
    head = torch.tensor(begin, dtype=pieces.dtype, device=pieces.device).expand(len(pieces), -1)
    tail = pieces.new_full((len(pieces), len(end)), tokenizer["padding"])
    batch = torch.cat([head, pieces, tail], dim=1)
    position = torch.arange(batch.shape[1], device=pieces.device)
    for number, piece in enumerate(end):
        batch = batch.masked_fill(position == lengths[:, None] + len(begin) + number, piece)
    return batch, lengths + len(begin) + len(end)


def tokenize(text: str, settings: Mapping[str, Any]) -> list[str]:
    """The tokens of a text: lower-cased, substituted pattern by pattern, split at blanks, as `settings` say."""
    text = text.lower() if settings["lowercase"] else text
    for pattern, replacement in settings["substitutions"]:
        text = re.sub(pattern, replacement, text)
    return text.split()


def _trimmed(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Texts without the padding that all of them share."""
    return tokens[:, : int(lengths.max())], lengths


def _padded(feeds: Sequence[Feed]) -> Feed:
    """Texts of several lengths as one feed; what stands behind a text's length has no effect."""
    lengths = np.concatenate([feed["lengths"] for feed in feeds])
    tokens = np.zeros((len(feeds), int(lengths.max())), np.int64)
    for row, feed in zip(tokens, feeds, strict=True):
        row[: feed["tokens"].shape[1]] = feed["tokens"][0]
    return {"tokens": tokens, "lengths": lengths}


def _ids(text: str, signature: Mapping[str, Any]) -> list[int]:
    """The tokens of a text as ids.

    Raises:
        Failure: there are none.
    """
    tokenizer = signature["tokenizer"]
    if tokenizer["name"] == subwords.NAME:
        return subwords.encode([text], tokenizer)[0]
    if not (words := tokenize(text, tokenizer)):
        raise Failure("the text has no word in it")
    ids = {token: number for number, token in enumerate(signature["vocabulary"])}
    return [ids.get(word, 0) for word in words]


class Text:
    """The kind of labelled texts."""

    options = TextLoader
    batches = TextBatches
    inputs = Inputs(("tokens", "lengths"), ({0: "batch", 1: "time"}, {0: "batch"}), _trimmed, _padded)
    suffixes = (".txt",)
    example_argument = '"A text in quotation marks."'
    hub_prefix = "text"

    def count(self, arrays: Mapping[str, Any]) -> int:
        return len(arrays["labels"])

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """A text, or a text file, as `tokens` int64 [1, T] and `lengths` int64 [1], shortened as in training."""
        if source is None:
            raise Failure(f"no input: {signature['name']} wants a text")
        path = Path(source)
        is_file = len(source) < 250 and path.is_file()  # the system refuses to look for longer names
        if not is_file and re.fullmatch(r"\S+\.txt", source):
            raise Failure(f"{source}: no such file")
        # "utf-8-sig" removes a byte-order mark, as packing does.
        text = path.read_text("utf-8-sig", errors="replace") if is_file else source
        if not text.strip():
            raise Failure("the text has no word in it")
        tokenizer = signature["tokenizer"]
        begin, end = tokenizer.get("begin", []), tokenizer.get("end", [])
        tokens = np.array(_ids(text, signature), np.int64)
        length = min(len(tokens), (signature["max_tokens"] or sys.maxsize) - len(begin) - len(end))
        shortened = tokens[without_middle(np.arange(length), len(tokens), length)]
        tokens = np.array([*begin, *shortened, *end], np.int64)
        return {"tokens": tokens[None], "lengths": np.array([len(tokens)], np.int64)}

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> list[str]:
        """Packed texts as the network reads them: their tokens."""
        texts = []
        for index in indices:
            start, end = split["offsets"][index : index + 2].tolist()
            tokens = split["tokens"][start:end].tolist()
            if meta.get("tokenizer", {}).get("name") == subwords.NAME:
                texts.append(subwords.decode(tokens, meta["tokenizer"]))
            else:
                texts.append(" ".join(meta["vocabulary"][token] for token in tokens))
        return texts

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        assert isinstance(loader, TextLoader)
        is_subwords = meta.get("tokenizer", {}).get("name") == subwords.NAME  # their tokenizer has the vocabulary
        keys = ("classes", "tokenizer") if is_subwords else ("classes", "tokenizer", "vocabulary")
        return {"max_tokens": loader.max_tokens} | {key: meta[key] for key in keys if key in meta}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return """\
tokens = np.array([[12, 7, 345, 2]], dtype=np.int64)  # [batch, time]: word ids from the vocabulary beside the model
lengths = np.array([4], dtype=np.int64)  # [batch]: words in each text, the rest is padding
"""


KIND = Text()
