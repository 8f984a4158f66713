"""Perceptron, ConvNet and RowReader, and their textbook companions: activations, L1, rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from src.common.errors import ConfigError, Failure
from src.configuration.composing import compose
from src.configuration.schema import SGD, Adam
from src.data.augmentation import rotate
from src.data.kinds.images import ImageBatches, ImageLoader
from src.models.convnet import ConvNet
from src.models.optimization import build_optimizer
from src.models.perceptron import Perceptron
from src.models.recurrent import RowReader

SHAPE = [1, 28, 28]


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


NETWORKS: dict[str, Any] = {
    "perceptron": (lambda: Perceptron(SHAPE, 10, hidden=[64]), 784 * 64 + 64 + 64 * 10 + 10),
    "deeper": (lambda: Perceptron(SHAPE, 10, hidden=[64, 32]), 784 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10),
    "linear": (lambda: Perceptron(SHAPE, 10, hidden=[]), 784 * 10 + 10),
    "mnist_cnn": (
        lambda: ConvNet(SHAPE, 10, widths=[32, 64], hidden=[64]),
        9 * 32 + 32 + 9 * 32 * 64 + 64 + 49 * 64 * 64 + 64 + 64 * 10 + 10,
    ),
    "lstm": (lambda: RowReader(SHAPE, 10, cell="lstm", hidden=8), 4 * (8 * 36 + 16) + 4 * (8 * 16 + 16) + 90),
    "gru": (lambda: RowReader(SHAPE, 10, cell="gru", hidden=8), 3 * (8 * 36 + 16) + 3 * (8 * 16 + 16) + 90),
    "rnn": (lambda: RowReader(SHAPE, 10, cell="rnn", hidden=8), (8 * 36 + 16) + (8 * 16 + 16) + 90),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_expected_parameters_and_logits(name: str) -> None:
    build, count = NETWORKS[name]
    network = build().eval()
    assert parameter_count(network) == count
    x = torch.randn(3, *SHAPE)
    assert network(x).shape == (3, 10)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]), atol=1e-5, rtol=1e-5)


def test_cifar10_convnet_has_five_convolutions_and_one_dense_layer() -> None:
    config = compose(["experiment=cifar10_convnet", "output=out"])
    network = config.model.network(shape=[3, 32, 32], classes=10)  # type: ignore[attr-defined]
    convolutions = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [16, 32, 64, 128, 256]
    assert sum(isinstance(m, nn.Linear) for m in network.modules()) == 1
    assert config.model.optimizer.name == "sgd"  # type: ignore[attr-defined]


def test_more_convolutions_than_the_image_allows_are_refused() -> None:
    with pytest.raises(Failure, match=r"5 convolutions halve an image of 28x28 to nothing; give at most 4"):
        ConvNet(SHAPE, 10, widths=[4] * 5, hidden=[])


def test_a_row_reader_depends_on_the_order_of_the_rows() -> None:
    torch.manual_seed(0)
    network = RowReader(SHAPE, 10, hidden=16).eval()
    x = torch.randn(2, *SHAPE)
    assert not torch.allclose(network(x), network(x.flip(2)))
    assert torch.allclose(network(x), network(x))


@pytest.mark.parametrize(
    ("activation", "layer"), [("relu", nn.ReLU), ("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid), ("gelu", nn.GELU)]
)
def test_an_activation_is_chosen_by_its_name(activation: Any, layer: type[nn.Module]) -> None:
    for network in (
        Perceptron(SHAPE, 10, hidden=[4], activation=activation),
        ConvNet(SHAPE, 10, widths=[4], hidden=[4], activation=activation),
    ):
        assert any(isinstance(m, layer) for m in network.modules())


# --- L1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l1_equals_an_l1_term_in_the_loss(momentum: float) -> None:
    def parameters_after_training(l1: float, in_loss: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        optimizer = build_optimizer([layer], SGD(name="sgd", lr=0.1, momentum=momentum, l1=l1))
        x = torch.randn(8, 5)
        for _ in range(4):
            loss = layer(x).square().mean() + in_loss * layer.weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach() for p in layer.parameters()]

    for actual, expected in zip(
        parameters_after_training(0.01, 0.0), parameters_after_training(0.0, 0.01), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_l1_shrinks_weights_to_zero_and_leaves_biases() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    bias = layer.bias.detach().clone()
    optimizer = build_optimizer([layer], Adam(name="adam", lr=0.01, l1=1.0))
    for _ in range(100):
        optimizer.zero_grad()
        (0 * layer(torch.ones(1, 5))).sum().backward()
        optimizer.step()
    assert float(layer.weight.detach().abs().max()) < 0.05
    assert torch.equal(layer.bias, bias)


def test_muon_with_l1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.optimizer\.rest: .* is not allowed: muon keeps each filter's norm"):
        compose(["experiment=cifar10_resnet", "output=out", "model.optimizer.rest.l1=0.1"])


# --- rotation ---------------------------------------------------------------------------------------------------------


def bar() -> torch.Tensor:
    """A bright bar from the centre to the right, uint8 [1, 1, 29, 29]."""
    image = torch.zeros(1, 1, 29, 29, dtype=torch.uint8)
    image[..., 13:16, 14:27] = 255
    return image


def test_rotation_is_about_the_centre_within_the_angle() -> None:
    rotated = rotate(bar().repeat(200, 1, 1, 1), 30, torch.Generator().manual_seed(0)).float()
    rows, columns = torch.meshgrid(torch.arange(29.0) - 14, torch.arange(29.0) - 14, indexing="ij")
    weight = rotated[:, 0].sum((1, 2))
    angles = torch.atan2((rotated[:, 0] * rows).sum((1, 2)) / weight, (rotated[:, 0] * columns).sum((1, 2)) / weight)
    degrees = angles.rad2deg()
    assert float(degrees.abs().max()) <= 30.5
    assert float(degrees.min()) < -20
    assert float(degrees.max()) > 20


def test_rotating_an_oblong_image_keeps_circles_round() -> None:
    """The sampling grid runs from -1 to 1 along both sides: an uncorrected rotation would shear the image."""
    rows, columns = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    disc = ((rows**2 + columns**2) <= 36).mul(255).to(torch.uint8)[None, None]
    rotated = rotate(disc.repeat(20, 1, 1, 1), 90, torch.Generator().manual_seed(0)).float()
    assert float((rotated - disc.float()).abs().mean()) < 6


def test_batches_are_rotated_in_training_only_and_reproducibly() -> None:
    split = {"images": bar().repeat(8, 1, 1, 1), "labels": torch.zeros(8, dtype=torch.int64)}
    loader = ImageLoader(batch_size=8, eval_batch_size=8, rotation=45.0)
    ((first, _),), ((again, _),) = (list(ImageBatches(split, {"kind": "images"}, loader, train=True)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, split["images"])
    ((evaluated, _),) = ImageBatches(split, {"kind": "images"}, loader, train=False)
    assert torch.equal(evaluated, split["images"])
