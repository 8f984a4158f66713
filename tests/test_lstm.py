"""The text classifier on padded batches: neither the length nor the content of the padding has an effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from src.configuration.schema import AdamW, Constant
from src.models.lstm import BidirectionalLSTM, MaskedPooling, TextClassifier, WordPairs, reverse_by_length

Pooling = Literal["mean", "max", "mean_max", "attention"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
LENGTHS = torch.tensor([1, 4, 7, 2])  # the longest is one shorter than the padded eight
META = {"vocabulary": [f"word{number}" for number in range(30)], "classes": ["bad", "good"]}


def classifier(pooling: Pooling = "mean_max", layers: int = 1, dropout: float = 0.3) -> TextClassifier:
    torch.manual_seed(0)
    model = TextClassifier(
        META,
        optimizer=AdamW(name="adamw", lr=1e-3),
        schedule=Constant(name="constant"),
        embedding=6,
        hidden=5,
        layers=layers,
        pooling=pooling,
        dropout=dropout,
        pairs=101,
    )
    assert model.pairs is not None
    for weight in model.pairs.parameters():  # zero before training
        nn.init.normal_(weight, std=0.1)
    return model.eval()


def torch_lstm(ours: BidirectionalLSTM, inputs: int, hidden: int, layers: int) -> nn.LSTM:
    """PyTorch's own bidirectional LSTM with the same weights."""
    reference = nn.LSTM(inputs, hidden, layers, batch_first=True, bidirectional=True)
    for layer in range(layers):
        for suffix, direction in (("", ours.forwards[layer]), ("_reverse", ours.backwards[layer])):
            for name, weight in direction.named_parameters():
                reference.get_parameter(name.replace("_l0", f"_l{layer}{suffix}")).data.copy_(weight)
    return reference


def test_only_the_real_steps_are_reversed() -> None:
    x = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    lengths = torch.tensor([4, 1, 3])
    assert reverse_by_length(x, lengths).tolist() == [[4, 3, 2, 1], [1, 2, 3, 4], [3, 2, 1, 4]]
    vectors = torch.randn(3, 4, 5)
    assert torch.equal(reverse_by_length(vectors, lengths)[2, 0], vectors[2, 2])
    assert torch.equal(reverse_by_length(reverse_by_length(vectors, lengths), lengths), vectors)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_padded_batch_equals_torchs_lstm_on_single_sequences(layers: int) -> None:
    torch.manual_seed(0)
    ours = BidirectionalLSTM(6, 5, layers, dropout=0.0)
    reference = torch_lstm(ours, 6, 5, layers)
    x = torch.randn(len(LENGTHS), 8, 6)
    outputs = ours(x, LENGTHS)
    assert outputs.shape == (len(LENGTHS), 8, 10)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(
            outputs[row, :length], reference(x[row : row + 1, :length])[0][0], atol=1e-6, rtol=1e-5
        )


def test_dropout_acts_between_layers_only() -> None:
    x = torch.randn(4, 8, 6)
    one, two = BidirectionalLSTM(6, 5, 1, dropout=0.5), BidirectionalLSTM(6, 5, 2, dropout=0.5)
    assert torch.equal(one(x, LENGTHS), one(x, LENGTHS))
    assert not torch.equal(two(x, LENGTHS), two(x, LENGTHS))


def test_the_operator_for_export_equals_the_layer() -> None:
    layer = BidirectionalLSTM(6, 5, 1, dropout=0.0)
    weights = [*layer.forwards[0].parameters(), *layer.backwards[0].parameters()]
    x = torch.randn(len(LENGTHS), 8, 6)
    with torch.no_grad():
        actual, expected = torch.ops.pipeline.bilstm(x, LENGTHS, weights), layer(x, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(actual[row, :length], expected[row, :length], atol=1e-6, rtol=1e-5)


def attention(pool: MaskedPooling, steps: Tensor) -> Tensor:
    weights = pool.query(torch.tanh(pool.hidden(steps))).softmax(0)
    return (weights * steps).sum(0)


REFERENCE: dict[Pooling, Callable[[MaskedPooling, Tensor], Tensor]] = {
    "mean": lambda pool, steps: steps.mean(0),
    "max": lambda pool, steps: steps.amax(0),
    "mean_max": lambda pool, steps: torch.cat([steps.mean(0), steps.amax(0)]),
    "attention": attention,
}


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("padding", [0.0, 1e4, -1e4])
def test_pooling_ignores_the_padding(kind: Pooling, padding: float) -> None:
    torch.manual_seed(0)
    pool = MaskedPooling(6, kind)
    x = torch.randn(len(LENGTHS), 8, 6)
    for row, length in enumerate(LENGTHS.tolist()):
        x[row, length:] = padding
    pooled = pool(x, LENGTHS)
    assert pooled.shape == (len(LENGTHS), pool.size)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(pooled[row], REFERENCE[kind](pool, x[row, :length]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("layers", [1, 2])
def test_logits_do_not_depend_on_the_padding(kind: Pooling, layers: int) -> None:
    model = classifier(kind, layers)
    tokens = torch.randint(30, (len(LENGTHS), 7))
    longer = torch.randint(30, (len(LENGTHS), 20))
    for row, length in enumerate(LENGTHS.tolist()):
        longer[row, :length] = tokens[row, :length]
    logits = model(tokens, LENGTHS)
    torch.testing.assert_close(model(longer, LENGTHS), logits, atol=1e-6, rtol=1e-5)
    for row, length in enumerate(LENGTHS.tolist()):
        single = model(tokens[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(single[0], logits[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_token_that_occurs_only_in_padding_has_no_gradient(kind: Pooling) -> None:
    model = classifier(kind)
    tokens = torch.full((len(LENGTHS), 8), 29)
    for row, length in enumerate(LENGTHS.tolist()):
        tokens[row, :length] = row
    model(tokens, LENGTHS).square().sum().backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert not gradient[29].any()
    assert gradient[: len(LENGTHS)].abs().sum(1).min() > 0


@pytest.mark.parametrize(
    ("kind", "pooled_size", "pooling_parameters"), [("mean", 10, 0), ("mean_max", 20, 0), ("attention", 10, 120)]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_classifier_has_the_parameters_of_its_parts(
    kind: Pooling, pooled_size: int, pooling_parameters: int, layers: int
) -> None:
    def lstm(inputs: int, hidden: int) -> int:
        return 2 * 4 * (inputs * hidden + hidden * hidden + 2 * hidden)  # directions, gates; two biases each in PyTorch

    pairs, embedding, output = (30 + 101) * 2, 30 * 6, 2 * pooled_size + 2
    expected = pairs + embedding + lstm(6, 5) + (layers - 1) * lstm(10, 5) + pooling_parameters + output
    assert sum(p.numel() for p in classifier(kind, layers).parameters()) == expected


def test_words_and_pairs_ignore_the_padding() -> None:
    pairs = WordPairs(vocabulary=10, buckets=101, classes=2)
    nn.init.normal_(pairs.words.weight)
    nn.init.normal_(pairs.pairs.weight)
    tokens = torch.tensor([[3, 4, 5, 9, 9], [7, 8, 9, 9, 9]])
    scores = pairs(tokens, torch.tensor([3, 1]))
    word_weights, pair_weights = pairs.words.weight, pairs.pairs.weight
    buckets = [(a * WordPairs.HASH + b) % 101 for a, b in ((3, 4), (4, 5))]
    first = (word_weights[[3, 4, 5]].sum(0) + pair_weights[buckets].sum(0)) / 5**0.5
    torch.testing.assert_close(scores, WordPairs.SCALE * torch.stack([first, word_weights[7]]))


def test_words_and_pairs_are_zero_before_training() -> None:
    pairs = WordPairs(vocabulary=10, buckets=101, classes=2)
    assert not pairs(torch.randint(0, 10, (4, 6)), torch.tensor([6, 5, 2, 1])).any()
