"""Tagging of words: a bidirectional LSTM over words and characters, and a conditional random field over their tags.

Lample et al., 2016; Ma and Hovy, 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from src.common.tag_schemes import is_allowed, parts_of, scheme_of
from src.configuration.schema import Dropout, Layers, Optimizer, Positive, PositiveInt, Schedule
from src.models.base import Model, Split
from src.models.layers import is_token
from src.models.lstm import BidirectionalLSTM, EmbeddingDropout, TextClassifier, reverse_by_length

FORBIDDEN = -10_000.0  # the score of a transition that the tags' scheme does not have


class _LogPartition(torch.autograd.Function):
    """The logarithm of the sum over all tag sequences: scores [B, T, K], lengths [B], ... -> fp32 [B].

    Its gradient is the tags' probabilities, which the sums over beginnings and ends of sequences give without a
    backward pass through the steps. Both are taken in the same loop: the ends' on the reversed sentences. In fp64 a
    step is a product of small matrices of exponentials: these reach down to e^-700, where fp32's end at e^-87.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        *scored, lengths = inputs
        scores, start, transitions, end = (values.double() for values in scored)
        both = torch.stack([scores, reverse_by_length(scores, lengths)])  # [2, B, T, K]
        factors = torch.stack([transitions, transitions.T]).exp()  # [2, K, K]
        state = both[:, :, 0] + torch.stack([start, end])[:, None]
        states = [state]
        for position in range(1, scores.shape[1]):
            most = state.max(2, keepdim=True).values
            state = both[:, :, position] + most + ((state - most).exp() @ factors).log()
            states.append(state)
        begun, ended = torch.stack(states, 2)  # [B, T, K] each, the tag's own score in both
        last = begun.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, begun.shape[2]))[:, 0]
        total = (last + end).logsumexp(1)
        ctx.save_for_backward(scores, factors[0], lengths, begun, reverse_by_length(ended, lengths), total)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].double()
        scores, factors, lengths, begun, ended, total = ctx.saved_tensors
        is_word = is_token(scores, lengths)[..., None]
        single = torch.where(is_word, (begun + ended - scores - total[:, None, None]).exp(), 0)  # probabilities
        single = single * gradient[:, None, None]
        # The probability of a transition is a product of what leads to it, its own factor and what follows.
        most = begun[:, :-1].max(2, keepdim=True).values
        before = (begun[:, :-1] - most).exp()
        after = torch.where(is_word[:, 1:], (ended[:, 1:] + most - total[:, None, None]).exp(), 0)
        joint = factors * (before.flatten(0, 1).T @ (after * gradient[:, None, None]).flatten(0, 1))
        last = single.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, single.shape[2]))[:, 0]
        return single.float(), single[:, 0].sum(0).float(), joint.float(), last.sum(0).float(), None


class CRF(nn.Module):
    """A linear-chain conditional random field over the tags of IOB2 or IOBES; computed in fp32.

    A sequence's score is the sum of its tags' scores, float [B, T, K], and of the transitions between them, the first
    and the last one included. Transitions that the scheme does not have are impossible.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__()
        count, scheme = len(tags), scheme_of(tags)
        self.start = nn.Parameter(torch.zeros(count))
        self.transitions = nn.Parameter(torch.zeros(count, count))  # from, to
        self.end = nn.Parameter(torch.zeros(count))
        allowed = [[is_allowed(before, tag, scheme) for tag in (*tags, None)] for before in (None, *tags)]
        table = torch.tensor(allowed)  # [1 + K, K + 1]: from the border, to the border
        self.register_buffer("allowed_start", table[0, :-1], persistent=False)
        self.register_buffer("allowed", table[1:, :-1], persistent=False)
        self.register_buffer("allowed_end", table[1:, -1], persistent=False)

    def parameters_of_paths(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the first tag [K], of transitions [K, K] (from, to) and of the last tag [K]."""
        pairs = (("start", "allowed_start"), ("transitions", "allowed"), ("end", "allowed_end"))
        start, transitions, end = (
            getattr(self, name).float().masked_fill(~getattr(self, mask), FORBIDDEN) for name, mask in pairs
        )
        return start, transitions, end

    def forward(self, scores: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """The negative log-likelihood of the tags, int64 [B, T], of each sentence: fp32 [B]."""
        start, transitions, end = self.parameters_of_paths()
        scores = scores.float()
        is_word = is_token(scores, lengths)
        own = scores.gather(2, tags[..., None])[..., 0]
        between = transitions.flatten()[tags[:, :-1] * len(start) + tags[:, 1:]]
        last = tags.gather(1, (lengths - 1)[:, None])[:, 0]
        path = (own * is_word).sum(1) + (between * is_word[:, 1:]).sum(1) + start[tags[:, 0]] + end[last]
        total: Tensor = _LogPartition.apply(scores, start, transitions, end, lengths)
        return total - path

    @torch.no_grad()
    def decode(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """The most probable tags (Viterbi): int64 [B, T], 0 behind a sentence's end."""
        start, transitions, end = self.parameters_of_paths()
        scores = scores.float()
        is_word = is_token(scores, lengths)
        state = scores[:, 0] + start
        stay = torch.arange(len(start), device=scores.device)
        origins = []  # of each tag of a step, the tag before it: [B, K]
        for position in range(1, scores.shape[1]):
            best, origin = (state[..., None] + transitions).max(1)
            is_real = is_word[:, position, None]
            state = torch.where(is_real, best + scores[:, position], state)
            origins.append(torch.where(is_real, origin, stay))
        tag = (state + end).argmax(1)
        tags = [tag]
        for origin in reversed(origins):
            tag = origin.gather(1, tag[:, None])[:, 0]
            tags.append(tag)
        return torch.stack(tags[::-1], 1) * is_word


class EntityF1(Metric):
    """F1 over entities: one counts as right if first word, last word and type are all right, as `conlleval` has it.

    `update` takes tags, int64 [B, T] in IOB2 or IOBES, which are valid sequences with `O` (0) behind a sentence's end.
    """

    right: Tensor
    predicted: Tensor
    actual: Tensor

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__()
        parts = [parts_of(tag) for tag in tags]
        types = sorted({entity_type for _, entity_type in parts})
        self.register_buffer("types", torch.tensor([types.index(t) for _, t in parts]), persistent=False)
        self.register_buffer("begins", torch.tensor([prefix in "BS" for prefix, _ in parts]), persistent=False)
        self.register_buffer("goes_on", torch.tensor([prefix in "IE" for prefix, _ in parts]), persistent=False)
        for name in ("right", "predicted", "actual"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        ends, starts, types = zip(*(self._entities(tags) for tags in (predicted, actual)), strict=True)
        is_same = ends[0] & ends[1] & (starts[0] == starts[1]) & (types[0] == types[1])
        self.right += is_same.sum()
        self.predicted += ends[0].sum()
        self.actual += ends[1].sum()

    def _entities(self, tags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where entities end, bool [B, T], and for such places where they begin and of which type they are."""
        begins, goes_on = (getattr(self, name)[tags] for name in ("begins", "goes_on"))
        position = torch.arange(tags.shape[1], device=tags.device)
        starts = torch.where(begins, position, -1).cummax(1).values
        goes_on_next = F.pad(goes_on[:, 1:], (0, 1))
        types = cast(Tensor, self.types)[tags]
        return (begins | goes_on) & ~goes_on_next, starts, types

    def compute(self) -> Tensor:
        """2 right / (predicted + actual); 0 where there is no entity."""
        return 2 * self.right / (self.predicted + self.actual).clamp(min=1)


class Tagging(Model):
    """Trains a network that scores the tags of each word, with a CRF above it.

    A batch ends with lengths, int64 [B], and tags, int64 [B, T]; `forward` takes all but the tags and gives scores,
    float [B, T, K].
    """

    task = "tagging"
    takes = ("tagged",)
    varies_in_shape = True

    def __init__(self, meta: Mapping[str, Any], *, optimizer: Optimizer, schedule: Schedule) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, train=("loss",), val=("loss", "accuracy"))
        self.crf = CRF(meta["tags"])
        self.val_entities = EntityF1(meta["tags"])

    def answer(self, *inputs: Tensor) -> Tensor:
        """The tags' scores, fp32 [B, T, K], 0 behind a sentence's end; with `path_scores` they give the best tags."""
        scores = self(*inputs).float()
        return scores * is_token(scores, inputs[-1])[..., None]

    def path_scores(self) -> dict[str, list[Any]]:
        """The CRF's scores `start` [K], `transitions` [K][K] (from, to) and `end` [K]."""
        values = self.crf.parameters_of_paths()
        return {name: v.tolist() for name, v in zip(("start", "transitions", "end"), values, strict=True)}

    def loss(self, batch: tuple[Tensor, ...], split: Split) -> tuple[Tensor, Tensor]:
        """The mean negative log-likelihood of a batch's sentences, and the scores."""
        *inputs, tags = batch
        scores = self(*inputs)
        losses = self.crf(scores, tags, inputs[-1])
        self.add(split, len(tags), loss=losses.sum())
        return losses.mean(), scores

    def step_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.loss(batch, "train")[0]

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        _, scores = self.loss(batch, "val")
        *_, lengths, tags = batch
        predicted = self.crf.decode(scores, lengths)
        is_right = (predicted == tags) & is_token(tags, lengths)
        self.add("val", lengths.sum(), accuracy=is_right.sum())  # of words, not of sentences
        self.val_entities.update(predicted, tags)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.val_entities.reset()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val_f1", self.val_entities.compute())
        self.val_entities.reset()


class CharacterCNN(nn.Module):
    """Characters of words, int64 [..., C], 0 behind a word's end -> [..., filters]: the maximum over the word.

    Ma and Hovy, 2016. The convolution of width 3 is a matrix product over neighbours side by side.
    """

    def __init__(self, embedding: int, filters: int) -> None:
        super().__init__()
        self.size = filters
        self.embedding = nn.Embedding(256, embedding, padding_idx=0)
        self.convolution = nn.Linear(3 * embedding, filters)

    def forward(self, characters: Tensor) -> Tensor:
        x = F.pad(self.embedding(characters), (0, 0, 1, 1))
        x = self.convolution(torch.cat([x[..., :-2, :], x[..., 1:-1, :], x[..., 2:, :]], dim=-1))
        # A word has a first character, if only padding's.
        is_padding = (characters == 0) & (torch.arange(characters.shape[-1], device=characters.device) > 0)
        return x.masked_fill(is_padding[..., None], float("-inf")).max(-2).values


class CharacterLSTM(nn.Module):
    """Characters of words, int64 [..., C] -> [..., 2 hidden]: the last states of both directions (Lample, 2016)."""

    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.size = 2 * hidden
        self.embedding = nn.Embedding(256, embedding, padding_idx=0)
        self.lstm = BidirectionalLSTM(embedding, hidden, 1, dropout=0.0)

    def forward(self, characters: Tensor) -> Tensor:
        words = characters.flatten(0, -2)
        lengths = (words > 0).sum(1).clamp(min=1)
        states = self.lstm(self.embedding(words), lengths)
        ahead, back = states.chunk(2, dim=-1)
        last = ahead.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, ahead.shape[2]))[:, 0]
        return torch.cat([last, back[:, 0]], dim=1).unflatten(0, characters.shape[:-1])


class Affixes(nn.Module):
    """Beginnings and ends of words, of 2, 3 and 4 bytes in lower case: int64 [B, T, C] -> [B, T, 6 size].

    Each is hashed into `buckets` vectors. A convolution's maximum does not tell where in a word it was.
    """

    LENGTHS = (2, 3, 4)
    PRIMES = (1, 769, 1_000_003, 15_485_863)  # factors of the bytes in a hash

    def __init__(self, buckets: int, size: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.size = 2 * len(self.LENGTHS) * size
        self.embedding = nn.Embedding(2 * len(self.LENGTHS) * buckets, size)
        # A beginning and an end of each length in turn: its bytes' factors, and its first vector in the table.
        lengths = torch.tensor(self.LENGTHS).repeat_interleave(2)
        numbers = torch.arange(len(lengths))
        is_inside = torch.arange(max(self.LENGTHS)) < lengths[:, None]
        self.register_buffer("lengths", lengths, persistent=False)  # [6]
        self.register_buffer("factors", torch.tensor(self.PRIMES) * is_inside, persistent=False)  # [6, 4]
        self.register_buffer("tables", numbers * buckets, persistent=False)
        self.register_buffer("is_end", numbers % 2 == 1, persistent=False)
        self.lengths: Tensor
        self.factors: Tensor
        self.tables: Tensor
        self.is_end: Tensor

    def forward(self, characters: Tensor) -> Tensor:
        widest = max(self.LENGTHS)
        is_upper = (characters >= 65) & (characters <= 90)
        letters = F.pad(characters + 32 * is_upper, (widest, widest))
        sizes = (characters > 0).sum(-1, keepdim=True)
        first = torch.where(self.is_end, sizes + widest - self.lengths, widest)  # of each affix: [..., 6]
        at = first[..., None] + torch.arange(widest, device=characters.device)  # [..., 6, 4]
        bytes_of = letters.gather(-1, at.flatten(-2)).unflatten(-1, self.factors.shape)
        codes = (bytes_of * self.factors).sum(-1) % self.buckets + self.tables
        return self.embedding(codes).flatten(-2)


def shapes_of(characters: Tensor, lengths: Tensor) -> Tensor:
    """How words are written, as numbers 0 or 1: int64 [B, T, C], lengths [B] -> float [B, T, 9].

    Begins with a capital; has a capital behind its first letter; has capitals only; has a small letter; has a digit;
    has digits and marks only; has a mark; has a letter beyond ASCII; the last is the share of words in capitals of the
    sentence: in a headline capitals say nothing.
    """
    is_upper = (characters >= 65) & (characters <= 90)
    is_lower = (characters >= 97) & (characters <= 122)
    is_digit = (characters >= 48) & (characters <= 57)
    is_beyond = characters >= 128
    is_mark = (characters > 0) & ~(is_upper | is_lower | is_digit | is_beyond)
    has_upper, has_lower, has_digit, has_mark, has_beyond = (
        part.any(-1) for part in (is_upper, is_lower, is_digit, is_mark, is_beyond)
    )
    is_capitals = has_upper & ~has_lower
    features = torch.stack(
        [
            is_upper[..., 0],
            is_upper.sum(-1) > is_upper[..., 0],
            is_capitals,
            has_lower,
            has_digit,
            ~(has_upper | has_lower | has_beyond),
            has_mark,
            has_beyond,
        ],
        dim=-1,
    ).float()
    is_word = is_token(characters, lengths)
    letters = (is_word & (has_upper | has_lower)).sum(1).clamp(min=1)
    share = ((is_word & is_capitals).sum(1) / letters)[:, None, None].expand(-1, characters.shape[1], 1)
    return torch.cat([features, share.to(features.dtype)], dim=-1)


SHAPES = 9  # numbers that `shapes_of` gives


class WordTagger(Tagging):
    """Embeddings of words, their characters, affixes and shapes; a bidirectional LSTM; a CRF.

    `characters`: how a vector is read off a word's characters. `affixes`: hash buckets for each of the six affixes;
    null: none. `dropout` acts on the LSTM's inputs and outputs, on the same ones for all words of a sentence.
    """

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        optimizer: Optimizer,
        schedule: Schedule,
        embedding: PositiveInt = 100,
        embedding_std: Positive = 0.1,
        characters: Literal["cnn", "lstm"] = "cnn",
        character_embedding: PositiveInt = 30,
        character_features: PositiveInt = 50,
        affixes: PositiveInt | None = 4096,
        affix_embedding: PositiveInt = 8,
        hidden: PositiveInt = 150,
        layers: Layers = 1,
        dropout: Dropout = 0.5,
    ) -> None:
        super().__init__(meta, optimizer=optimizer, schedule=schedule)
        self.words = nn.Embedding(len(meta["vocabulary"]), embedding)
        nn.init.normal_(self.words.weight, std=embedding_std)
        self.characters: CharacterCNN | CharacterLSTM = (
            CharacterCNN(character_embedding, character_features)
            if characters == "cnn"
            else CharacterLSTM(character_embedding, character_features)
        )
        self.affixes = Affixes(affixes, affix_embedding) if affixes else None
        if self.affixes is not None:
            nn.init.normal_(self.affixes.embedding.weight, std=embedding_std)
        inputs = embedding + self.characters.size + SHAPES + (self.affixes.size if self.affixes is not None else 0)
        self.dropout = EmbeddingDropout(dropout)
        self.lstm = BidirectionalLSTM(inputs, hidden, layers, dropout)
        self.score = nn.Linear(2 * hidden, len(meta["tags"]))

    def forward(self, words: Tensor, characters: Tensor, lengths: Tensor) -> Tensor:
        """words int64 [B, T], characters int64 [B, T, C], lengths int64 [B], at least 1 -> scores [B, T, K]."""
        features = [self.words(words), self.characters(characters)]
        if self.affixes is not None:
            features.append(self.affixes(characters))
        x = self.dropout(torch.cat(features, dim=-1))
        x = torch.cat([x, shapes_of(characters, lengths).to(x.dtype)], dim=-1)
        return self.score(self.dropout(self.lstm(x, lengths)))

    @staticmethod
    def onnx_operators() -> dict[Any, Callable[..., Any]]:
        """That of the LSTM."""
        return TextClassifier.onnx_operators()
