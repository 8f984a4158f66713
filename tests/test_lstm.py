"""The text classifier on padded batches: what stands in the padding, and how much of it there is, must not matter."""

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
LENGTHS = torch.tensor([1, 4, 7, 2])  # the longest is one short of the padded eight
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
    for votes in model.pairs.parameters():  # zero until they have learnt
        nn.init.normal_(votes, std=0.1)
    return model.eval()


def torch_twin(ours: BidirectionalLSTM, inputs: int, hidden: int, layers: int) -> nn.LSTM:
    """PyTorch's own bidirectional LSTM with the same weights."""
    twin = nn.LSTM(inputs, hidden, layers, batch_first=True, bidirectional=True)
    for layer in range(layers):
        for suffix, direction in (("", ours.forwards[layer]), ("_reverse", ours.backwards[layer])):
            for name, weight in direction.named_parameters():
                twin.get_parameter(name.replace("_l0", f"_l{layer}{suffix}")).data.copy_(weight)
    return twin


def test_only_the_real_steps_are_turned_round() -> None:
    x = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    lengths = torch.tensor([4, 1, 3])
    assert reverse_by_length(x, lengths).tolist() == [[4, 3, 2, 1], [1, 2, 3, 4], [3, 2, 1, 4]]
    vectors = torch.randn(3, 4, 5)
    assert torch.equal(reverse_by_length(vectors, lengths)[2, 0], vectors[2, 2])
    assert torch.equal(reverse_by_length(reverse_by_length(vectors, lengths), lengths), vectors)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_padded_batch_is_read_as_each_sequence_alone_is_by_torchs_own_bidirectional_lstm(layers: int) -> None:
    torch.manual_seed(0)
    ours = BidirectionalLSTM(6, 5, layers, dropout=0.0)
    twin = torch_twin(ours, 6, 5, layers)
    x = torch.randn(len(LENGTHS), 8, 6)
    found = ours(x, LENGTHS)
    assert found.shape == (len(LENGTHS), 8, 10)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(found[row, :length], twin(x[row : row + 1, :length])[0][0], atol=1e-6, rtol=1e-5)


def test_dropout_acts_between_layers_only() -> None:
    x = torch.randn(4, 8, 6)
    one, two = BidirectionalLSTM(6, 5, 1, dropout=0.5), BidirectionalLSTM(6, 5, 2, dropout=0.5)
    assert torch.equal(one(x, LENGTHS), one(x, LENGTHS))
    assert not torch.equal(two(x, LENGTHS), two(x, LENGTHS))


def test_the_operator_for_export_answers_as_the_layer_does() -> None:
    layer = BidirectionalLSTM(6, 5, 1, dropout=0.0)
    weights = [*layer.forwards[0].parameters(), *layer.backwards[0].parameters()]
    x = torch.randn(len(LENGTHS), 8, 6)
    with torch.no_grad():
        found, wanted = torch.ops.pipeline.bilstm(x, LENGTHS, weights), layer(x, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(found[row, :length], wanted[row, :length], atol=1e-6, rtol=1e-5)


def attention(pool: MaskedPooling, steps: Tensor) -> Tensor:
    weights = pool.query(torch.tanh(pool.hidden(steps))).softmax(0)
    return (weights * steps).sum(0)


BY_HAND: dict[Pooling, Callable[[MaskedPooling, Tensor], Tensor]] = {
    "mean": lambda pool, steps: steps.mean(0),
    "max": lambda pool, steps: steps.amax(0),
    "mean_max": lambda pool, steps: torch.cat([steps.mean(0), steps.amax(0)]),
    "attention": attention,
}


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("padding", [0.0, 1e4, -1e4])
def test_pooling_sees_the_real_steps_alone(kind: Pooling, padding: float) -> None:
    torch.manual_seed(0)
    pool = MaskedPooling(6, kind)
    x = torch.randn(len(LENGTHS), 8, 6)
    for row, length in enumerate(LENGTHS.tolist()):
        x[row, length:] = padding
    found = pool(x, LENGTHS)
    assert found.shape == (len(LENGTHS), pool.size)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(found[row], BY_HAND[kind](pool, x[row, :length]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("layers", [1, 2])
def test_logits_depend_neither_on_the_padding_nor_on_what_is_in_it(kind: Pooling, layers: int) -> None:
    model = classifier(kind, layers)
    tokens = torch.randint(30, (len(LENGTHS), 7))
    longer = torch.randint(30, (len(LENGTHS), 20))
    for row, length in enumerate(LENGTHS.tolist()):
        longer[row, :length] = tokens[row, :length]
    wanted = model(tokens, LENGTHS)
    torch.testing.assert_close(model(longer, LENGTHS), wanted, atol=1e-6, rtol=1e-5)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(tokens[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(alone[0], wanted[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_token_that_stands_in_the_padding_only_learns_nothing(kind: Pooling) -> None:
    model = classifier(kind)
    tokens = torch.full((len(LENGTHS), 8), 29)
    for row, length in enumerate(LENGTHS.tolist()):
        tokens[row, :length] = row
    model(tokens, LENGTHS).square().sum().backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    assert not gradient[29].any()
    assert gradient[: len(LENGTHS)].abs().sum(1).min() > 0


@pytest.mark.parametrize(("kind", "pooled", "learnt"), [("mean", 10, 0), ("mean_max", 20, 0), ("attention", 10, 120)])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_parameters_are_those_of_the_parts(kind: Pooling, pooled: int, learnt: int, layers: int) -> None:
    def lstm(inputs: int, hidden: int) -> int:
        return 2 * 4 * (inputs * hidden + hidden * hidden + 2 * hidden)  # directions, gates; two biases each in PyTorch

    votes = (30 + 101) * 2
    wanted = votes + 30 * 6 + lstm(6, 5) + (layers - 1) * lstm(10, 5) + learnt + 2 * pooled + 2
    assert sum(p.numel() for p in classifier(kind, layers).parameters()) == wanted


def test_words_and_pairs_vote_by_what_is_inside_a_text_alone() -> None:
    votes = WordPairs(vocabulary=10, buckets=101, classes=2)
    nn.init.normal_(votes.words.weight)
    nn.init.normal_(votes.pairs.weight)
    tokens = torch.tensor([[3, 4, 5, 9, 9], [7, 8, 9, 9, 9]])
    found = votes(tokens, torch.tensor([3, 1]))
    words, pairs = votes.words.weight, votes.pairs.weight
    bucket = [(a * WordPairs.HASH + b) % 101 for a, b in ((3, 4), (4, 5))]
    first = (words[[3, 4, 5]].sum(0) + pairs[bucket].sum(0)) / 5**0.5
    torch.testing.assert_close(found, WordPairs.SCALE * torch.stack([first, words[7]]))


def test_words_and_pairs_do_not_speak_before_they_have_learnt() -> None:
    votes = WordPairs(vocabulary=10, buckets=101, classes=2)
    assert not votes(torch.randint(0, 10, (4, 6)), torch.tensor([6, 5, 2, 1])).any()
