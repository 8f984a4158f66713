"""Classifiers as Lightning modules: the base of those for images and for texts, and the one for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import Build, LabelSmoothing, Optimizer, Schedule
from src.models.base import Model, Split


class Classifier(Model):
    """Cross-entropy training of `self.network`; the last element of a batch is the labels, int64 [B]."""

    task = "classification"

    def __init__(self, *, optimizer: Optimizer, schedule: Schedule, label_smoothing: LabelSmoothing = 0.0) -> None:
        means = ("loss", "accuracy")
        super().__init__(optimizer=optimizer, schedule=schedule, train=means, val=means)
        self.label_smoothing = label_smoothing

    def answer(self, *inputs: Tensor) -> Tensor:
        """Class probabilities, fp32 [B, classes]."""
        return self(*inputs).float().softmax(1)

    def loss(self, batch: tuple[Tensor, ...], split: Split, smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of a batch; adds to the epoch's means."""
        *inputs, labels = batch
        logits = self(*inputs).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        with torch.no_grad():
            self.add(
                split, len(labels), loss=loss * len(labels), accuracy=(logits.argmax(1) == labels).sum().to(loss.dtype)
            )
        return loss

    def step_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.loss(batch, "train", self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.loss(batch, "val")


@runtime_checkable
class FitsWhitening(Protocol):
    """A network whose first layer is set from training images, as FastResNet's."""

    def fit_whitening(self, images: Tensor) -> None:
        """`images`: normalised float [N, C, H, W]."""


class ImageClassifier(Classifier):
    """Classifies images: bytes are normalised by the training part's mean and deviation, then go through `network`."""

    takes = ("images",)

    PREPARED_ON = 5000  # training images that a network may see before the first step, fewer of more than 32x32

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        network: Build,
        optimizer: Optimizer,
        schedule: Schedule,
        label_smoothing: LabelSmoothing = 0.0,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, label_smoothing=label_smoothing)
        channels = meta["shape"][0]
        self.register_buffer("mean", torch.tensor(meta["mean"]).mul(255).view(1, channels, 1, 1))
        self.register_buffer("std", torch.tensor(meta["std"]).mul(255).view(1, channels, 1, 1))
        self.mean: Tensor
        self.std: Tensor
        self.network: nn.Module = network(shape=meta["shape"], classes=len(meta["classes"]))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> logits [B, classes]."""
        return self.network(self._normalised(images))

    def prepare(self, split: Mapping[str, Tensor]) -> None:
        """Fits the network's whitening, if it has one, to the first training images."""
        if isinstance(self.network, FitsWhitening):
            images = split["images"]
            count = max(1, self.PREPARED_ON * 3 * 32 * 32 // images[0].numel())
            self.network.fit_whitening(self._normalised(images[: min(count, self.PREPARED_ON)]))

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std
