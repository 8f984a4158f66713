"""A bidirectional LSTM that reads padded batches and forgets nothing of their lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import Optimizer, Positive, PositiveInt, Probability, Schedule
from src.models.classifier import Classifier


def reverse_by_length(x: Tensor, lengths: Tensor) -> Tensor:
    """Turns the first `lengths[i]` steps of each x[i] round, and leaves the padding where it is. x: [B, T, ...]."""
    place = torch.arange(x.shape[1], device=x.device)[None, :]
    source = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return x.gather(1, source.view(*source.shape, *[1] * (x.dim() - 2)).expand_as(x))


class BidirectionalLSTM(nn.Module):
    """Layers of one LSTM forwards and one backwards over the real steps: [B, T, in], lengths [B] -> [B, T, 2 hidden].

    On padded input, since packed sequences train at a seventh of the speed on a CPU and cannot be exported. The forward
    direction never sees padding before a real step; the backward one reads the sequence turned round by its length, so
    it begins at the last real step. Outputs beyond a length are arbitrary: mask them.

    Without `in_order` the last layer's backward half stays in the order in which it was read, last step first: enough
    for whoever takes a mean or a maximum over the steps, and one pass over the memory less.
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
            backwards = back(reverse_by_length(x, lengths))[0]
            if self.in_order or number + 1 < len(self.forwards):
                backwards = reverse_by_length(backwards, lengths)
            x = torch.cat([ahead(x)[0], backwards], dim=-1)
        return x


@torch.library.custom_op("pipeline::bilstm", mutates_args=())
def bilstm(x: Tensor, lengths: Tensor, weights: list[Tensor]) -> Tensor:
    """One bidirectional layer as one operator, for export: torch.export would unroll an LSTM and freeze the length.

    `weights`: those of nn.LSTM, forwards then backwards. Inference only.
    """
    state = x.new_zeros(1, len(x), weights[1].shape[1])

    def read(values: Tensor, given: list[Tensor]) -> Tensor:
        return torch.lstm(values, (state, state), given, True, 1, 0.0, False, False, True)[0]

    back = reverse_by_length(read(reverse_by_length(x, lengths), weights[4:]), lengths)
    return torch.cat([read(x, weights[:4]), back], dim=-1)


@bilstm.register_fake
def _(x: Tensor, lengths: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], 2 * weights[1].shape[1])


class EmbeddingDropout(nn.Module):
    """Drops features of the embeddings, the same ones for each token of a text (Gal and Ghahramani, 2016): [B, T, D].

    Random numbers for each token and feature would cost as much time as the forward pass of the LSTM.
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
        inside = (torch.arange(x.shape[1], device=x.device)[None, :] < lengths[:, None])[..., None]
        if self.kind == "attention":
            scores = self.query(torch.tanh(self.hidden(x))).float().masked_fill(~inside, float("-inf"))
            return (scores.softmax(1).to(x.dtype) * x).sum(1)
        pooled = []
        if "mean" in self.kind:
            pooled.append((x * inside).sum(1) / lengths[:, None].to(x.dtype))
        if "max" in self.kind:
            pooled.append(x.masked_fill(~inside, float("-inf")).max(1).values)  # see FastResNet on amax
        return torch.cat(pooled, dim=1)


class WordPairs(nn.Module):
    """A linear model on words and pairs of neighbours (Wang and Manning, 2012).

    Tokens int64 [B, T] and lengths [B] -> logits [B, classes].

    Each word, and each of `buckets` into which the pairs are hashed, votes for the classes; the votes are summed and
    divided by the root of their number. "Not good" is learnt by heart, which an LSTM must first learn to read.
    """

    HASH = 1_000_003  # a prime: pairs spread evenly over any number of buckets
    SCALE = 6.0  # of the votes: so many times faster than the LSTM's weights they learn under Adam

    def __init__(self, vocabulary: int, buckets: int, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, classes)
        self.pairs = nn.Embedding(buckets, classes)
        for votes in (self.words, self.pairs):
            nn.init.zeros_(votes.weight)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        pairs = (tokens[:, :-1] * self.HASH + tokens[:, 1:]) % self.pairs.num_embeddings
        place = torch.arange(tokens.shape[1], device=tokens.device)[None, :, None]
        last = lengths[:, None, None]
        words = (self.words(tokens) * (place < last)).sum(1)
        votes = words + (self.pairs(pairs) * (place[:, 1:] < last)).sum(1)
        return self.SCALE * votes / (2 * lengths[:, None] - 1).sqrt()


class TextClassifier(Classifier):
    """Embedding, bidirectional LSTM, masked pooling, linear layer; beside them, on request, `WordPairs`.

    `embedding_std`: embeddings begin at N(0, std). With PyTorch's 1 it takes epochs until what is learnt of a word
    outweighs its random beginning, by which time the network knows the training texts by heart.
    """

    takes = ("text",)

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
        layers: PositiveInt = 1,
        pooling: Literal["mean", "max", "mean_max", "attention"] = "mean_max",
        dropout: Probability = 0.3,
        pairs: PositiveInt | None = None,
        label_smoothing: Probability = 0.0,
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
        read = self.lstm(self.embedding_dropout(self.embedding(tokens)), lengths)
        logits = self.classify(self.dropout(self.pooling(read, lengths)))
        return logits if self.pairs is None else logits + self.pairs(tokens, lengths)

    @staticmethod
    def onnx_operators() -> dict[Any, Callable[..., Any]]:
        """`pipeline::bilstm` in ONNX, whose LSTM takes lengths and both directions at once."""
        from onnxscript import opset18

        op: Any = opset18  # its signatures tell tensor types apart, which tracing does not know

        def direction(weights: Sequence[Any]) -> tuple[Any, Any, Any]:
            # PyTorch's gates are input, forget, cell, output; ONNX's are input, output, forget, cell.
            turned = []
            for weight in weights:
                i, f, c, o = op.Split(weight, axis=0, num_outputs=4)
                turned.append(op.Concat(i, o, f, c, axis=0))
            return turned[0], turned[1], op.Concat(turned[2], turned[3], axis=0)

        def layer(x: Any, lengths: Any, weights: Sequence[Any]) -> Any:
            ahead, back = direction(weights[:4]), direction(weights[4:])
            first = op.Constant(value_ints=[0])
            w, r, b = (
                op.Concat(op.Unsqueeze(f, first), op.Unsqueeze(g, first), axis=0)
                for f, g in zip(ahead, back, strict=True)
            )
            found, _, _ = op.LSTM(
                op.Transpose(x, perm=[1, 0, 2]),
                w,
                r,
                b,
                op.Cast(lengths, to=6),  # int32
                direction="bidirectional",
                hidden_size=weights[1].shape[1],
            )
            # [T, 2, B, H] -> [B, T, 2 H]
            return op.Reshape(op.Transpose(found, perm=[2, 0, 1, 3]), op.Constant(value_ints=[0, 0, -1]))

        return {torch.ops.pipeline.bilstm.default: layer}
