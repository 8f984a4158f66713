"""Batches that cannot fit into memory are refused before they are tried."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import ConfigError
from src.configuration.schema import SGD, Constant
from src.data.kinds.images import ImageBatches, ImageLoader
from src.models.classifier import ImageClassifier
from src.training import memory

SIDE = 256
META = {"kind": "images", "shape": [3, SIDE, SIDE], "classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.25] * 3}


class Network(nn.Module):
    """A convolution to five maps, normalised and cut at zero, their means, dropout, a linear layer."""

    def __init__(self, shape: Any, classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.rectify = nn.ReLU()
        self.classify = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rectify(self.norm(self.convolution(x)))
        return self.classify(nn.functional.dropout(x.mean((2, 3)), training=self.training))


def model() -> ImageClassifier:
    network: Any = Network
    return ImageClassifier(
        META, network=network, optimizer=SGD(name="sgd", lr=0.1), schedule=Constant(name="constant")
    ).eval()


def training(size: int = 80, world: int = 1) -> ImageBatches:
    images = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8).expand(100, -1, -1, -1)
    loader = ImageLoader(batch_size=size)
    return ImageBatches({"images": images, "labels": torch.arange(100) % 2}, META, loader, train=True, world=world)


def config(train: ImageBatches) -> Any:
    return SimpleNamespace(loader=train.loader, trainer=SimpleNamespace(accelerator="cpu"))


# Kept for the backward pass: the image, the convolution's five maps, and those after the cut at zero. In evaluation the
# normalisation has most: five maps in, five out.
TRAINING, EVALUATION = 13 * SIDE * SIDE * 4, 10 * SIDE * SIDE * 4


def test_an_example_takes_what_the_backward_pass_needs_of_it() -> None:
    demand = memory.demand(model(), training())
    assert demand is not None
    assert demand.training == pytest.approx(TRAINING, rel=0.001)
    assert demand.evaluation == EVALUATION


def test_a_look_at_the_memory_changes_neither_the_model_nor_random_states() -> None:
    torch.manual_seed(1)
    network = model()
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    state = torch.get_rng_state()
    memory.demand(network, training())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_buffers())
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("free", "size", "world", "message"),
    [
        (79 * TRAINING, 80, 1, r"data\.loader\.batch_size: 80 images of 256x256 take at least .* give at most 79"),
        (39 * TRAINING, 80, 2, r"data\.loader\.batch_size: 80 images of 256x256 .* in each process.* at most 78"),
        (30 * EVALUATION, 2, 1, r"data\.loader\.eval_batch_size: 31 images of 256x256 .* give at most 30"),
    ],
)
def test_a_batch_that_cannot_fit_is_refused_with_the_largest_that_can(
    free: int, size: int, world: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free + 10_000)
    monkeypatch.setattr(memory, "LARGE", 0)
    train = training(size, world)
    with pytest.raises(ConfigError, match=message):
        memory.refuse_too_large(config(train), META, model(), train)


def test_a_batch_that_may_fit_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    train = training(80)
    monkeypatch.setattr(memory, "free_memory", lambda: 81 * TRAINING)
    memory.refuse_too_large(config(train), META, model(), train)
    monkeypatch.setattr(memory, "free_memory", lambda: None)  # the system does not say
    memory.refuse_too_large(config(train), META, model(), train)


def test_small_batches_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    train = training(20)
    monkeypatch.setattr(memory, "demand", lambda *arguments: pytest.fail("looked at"))
    train.loader = ImageLoader(batch_size=20, eval_batch_size=20)
    memory.refuse_too_large(config(train), META, model(), train)
