"""A bidirectional LSTM text classifier over padded batches, masked by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import (
    Dropout,
    LabelSmoothing,
    Layers,
    Optimizer,
    Positive,
    PositiveInt,
    Probability,
    Schedule,
)
from src.models.classifier import Classifier
from src.models.layers import run_cells


def reverse_by_length(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverses the first `lengths[i]` steps of each x[i]; the padding stays in place. x: [B, T, ...]."""
    position = torch.arange(x.shape[1], device=x.device)[None, :]
    source = torch.where(position < lengths[:, None], lengths[:, None] - 1 - position, position)
    return x.gather(1, source.view(*source.shape, *[1] * (x.dim() - 2)).expand_as(x))


class BidirectionalLSTM(nn.Module):
    """Layers of one forward and one backward LSTM over the real steps: [B, T, in], lengths [B] -> [B, T, 2 hidden].

    The input is padded, since packed sequences train at a seventh of the speed on a CPU and cannot be exported. The
    forward direction never sees padding before a real step; the backward one reads the sequence reversed by its length,
    so it begins at the last real step. Outputs beyond a length are arbitrary: mask them.

    Without `in_order` the backward half of the last layer stays reversed, last step first: enough for a mean or a
    maximum over the steps, and one pass over the memory less.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, dropout: float, *, in_order: bool = True) -> None:
        super().__init__()
        self.in_order = in_order
        sizes = [inputs] + [2 * hidden] * (layers - 1)
        self.forwards = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.backwards = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for number, (ahead, back) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            x = self.dropout(x) if number else x
            if torch.compiler.is_exporting():
                x = torch.ops.pipeline.bilstm(x, lengths, [*ahead.parameters(), *back.parameters()])
                continue
            backwards = run_cells(back, reverse_by_length(x, lengths))
            if self.in_order or number + 1 < len(self.forwards):
                backwards = reverse_by_length(backwards, lengths)
            x = torch.cat([run_cells(ahead, x), backwards], dim=-1)
        return x


@torch.library.custom_op("pipeline::bilstm", mutates_args=())
def bilstm(x: Tensor, lengths: Tensor, weights: list[Tensor]) -> Tensor:
    """One bidirectional layer as one operator, for export: torch.export would unroll an LSTM and fix the length.

    `weights`: those of nn.LSTM, forward then backward. Inference only.
    """
    state = x.new_zeros(1, len(x), weights[1].shape[1])

    def read(values: Tensor, direction: list[Tensor]) -> Tensor:
        return torch.lstm(values, (state, state), direction, True, 1, 0.0, False, False, True)[0]

    back = reverse_by_length(read(reverse_by_length(x, lengths), weights[4:]), lengths)
    return torch.cat([read(x, weights[:4]), back], dim=-1)


@bilstm.register_fake
def _(x: Tensor, lengths: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], 2 * weights[1].shape[1])


class EmbeddingDropout(nn.Module):
    """Drops features of the embeddings, the same ones for every token of a text (Gal and Ghahramani, 2016): [B, T, D].

    Random numbers for every token and feature would take as long as the forward pass of the LSTM.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), self.probability)


class MaskedPooling(nn.Module):
    """Pools over the real steps: [B, T, D] and lengths [B] -> [B, size].

    `mean`, `max`, `mean_max` (both, one after the other), or `attention` (a learned query, Yang et al., 2016).
    """

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.size = 2 * size if kind == "mean_max" else size
        if kind == "attention":
            self.hidden = nn.Linear(size, size)
            self.query = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        is_token = (torch.arange(x.shape[1], device=x.device)[None, :] < lengths[:, None])[..., None]
        if self.kind == "attention":
            scores = self.query(torch.tanh(self.hidden(x))).float().masked_fill(~is_token, float("-inf"))
            return (scores.softmax(1).to(x.dtype) * x).sum(1)
        pooled = []
        if "mean" in self.kind:
            pooled.append((x * is_token).sum(1) / lengths[:, None].to(x.dtype))
        if "max" in self.kind:
            pooled.append(x.masked_fill(~is_token, float("-inf")).max(1).values)  # see FastResNet on amax
        return torch.cat(pooled, dim=1)


class WordPairs(nn.Module):
    """A linear model on words and pairs of neighbours (Wang and Manning, 2012).

    Tokens int64 [B, T] and lengths [B] -> logits [B, classes].

    Pairs are hashed into `buckets`. Every word and every bucket has a weight per class; the weights of a text are
    summed and divided by the square root of their number. "Not good" is one weight here, where an LSTM has to learn to
    combine two words.
    """

    HASH = 1_000_003  # a prime: pairs spread evenly over any number of buckets
    SCALE = 6.0  # factor on the sum: with Adam these weights learn 6 times as fast as the LSTM's

    def __init__(self, vocabulary: int, buckets: int, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, classes)
        self.pairs = nn.Embedding(buckets, classes)
        for table in (self.words, self.pairs):
            nn.init.zeros_(table.weight)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        pairs = (tokens[:, :-1] * self.HASH + tokens[:, 1:]) % self.pairs.num_embeddings
        position = torch.arange(tokens.shape[1], device=tokens.device)[None, :, None]
        end = lengths[:, None, None]
        words = (self.words(tokens) * (position < end)).sum(1)
        total = words + (self.pairs(pairs) * (position[:, 1:] < end)).sum(1)
        return self.SCALE * total / (2 * lengths[:, None] - 1).sqrt()


class TextClassifier(Classifier):
    """Embedding, bidirectional LSTM, masked pooling, linear layer; with `pairs`, the sum of these and `WordPairs`.

    `embedding_std`: standard deviation of the initial embeddings. With PyTorch's 1 the network overfits before the
    learned part of a word's embedding outweighs the random one.
    """

    takes = ("text",)
    varies_in_shape = True

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        optimizer: Optimizer,
        schedule: Schedule,
        embedding: PositiveInt = 128,
        embedding_std: Positive = 0.1,
        embedding_dropout: Probability = 0.3,
        hidden: PositiveInt = 96,
        layers: Layers = 1,
        pooling: Literal["mean", "max", "mean_max", "attention"] = "mean_max",
        dropout: Dropout = 0.3,
        pairs: PositiveInt | None = None,
        label_smoothing: LabelSmoothing = 0.0,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, label_smoothing=label_smoothing)
        self.embedding = nn.Embedding(len(meta["vocabulary"]), embedding)
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        self.embedding_dropout = EmbeddingDropout(embedding_dropout)
        self.lstm = BidirectionalLSTM(embedding, hidden, layers, dropout, in_order=pooling == "attention")
        self.pooling = MaskedPooling(2 * hidden, pooling)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(self.pooling.size, len(meta["classes"]))
        self.pairs = WordPairs(len(meta["vocabulary"]), pairs, len(meta["classes"])) if pairs else None

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens int64 [B, T] (anything beyond a length), lengths int64 [B], at least 1 -> logits [B, classes]."""
        states = self.lstm(self.embedding_dropout(self.embedding(tokens)), lengths)
        logits = self.classify(self.dropout(self.pooling(states, lengths)))
        return logits if self.pairs is None else logits + self.pairs(tokens, lengths)

    @staticmethod
    def onnx_operators() -> dict[Any, Callable[..., Any]]:
        """`pipeline::bilstm` in ONNX, whose LSTM takes lengths and both directions at once."""
        from onnxscript import opset18

        op: Any = opset18  # its signatures distinguish tensor types, which are unknown while tracing

        def direction(weights: Sequence[Any]) -> tuple[Any, Any, Any]:
            # PyTorch's gates are input, forget, cell, output; ONNX's are input, output, forget, cell.
            reordered = []
            for weight in weights:
                i, f, c, o = op.Split(weight, axis=0, num_outputs=4)
                reordered.append(op.Concat(i, o, f, c, axis=0))
            return reordered[0], reordered[1], op.Concat(reordered[2], reordered[3], axis=0)

        def layer(x: Any, lengths: Any, weights: Sequence[Any]) -> Any:
            ahead, back = direction(weights[:4]), direction(weights[4:])
            first = op.Constant(value_ints=[0])
            w, r, b = (
                op.Concat(op.Unsqueeze(f, first), op.Unsqueeze(g, first), axis=0)
                for f, g in zip(ahead, back, strict=True)
            )
            states, _, _ = op.LSTM(
                op.Transpose(x, perm=[1, 0, 2]),
                w,
                r,
                b,
                op.Cast(lengths, to=6),  # int32
                direction="bidirectional",
                hidden_size=weights[1].shape[1],
            )
            # [T, 2, B, H] -> [B, T, 2 H]
            return op.Reshape(op.Transpose(states, perm=[2, 0, 1, 3]), op.Constant(value_ints=[0, 0, -1]))

        return {torch.ops.pipeline.bilstm.default: layer}
