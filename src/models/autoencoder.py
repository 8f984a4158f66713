"""Autoencoders: an image pressed through a few numbers, and drawn again from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import Failure
from src.configuration.schema import Activation, Build, Dropout, Optimizer, PositiveInt, Schedule
from src.models.base import Model, Split
from src.models.layers import activation_layer


class DenseCoder(nn.Module):
    """Dense layers of `hidden` units to `latent` numbers, and the same in the opposite order back to an image.

    `encode` maps float [B, *shape] to [B, latent], `decode` back, to 0..1. Dropout follows each hidden activation.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        hidden: list[PositiveInt],
        latent: PositiveInt = 32,
        activation: Activation = "relu",
        dropout: Dropout = 0.5,
    ) -> None:
        super().__init__()
        widths = [math.prod(shape), *hidden]

        def layers(sizes: Sequence[int]) -> list[nn.Module]:
            return [
                layer
                for inputs, outputs in itertools.pairwise(sizes)
                for layer in (nn.Linear(inputs, outputs), activation_layer(activation), nn.Dropout(dropout))
            ]

        self.encode = nn.Sequential(nn.Flatten(), *layers(widths), nn.Linear(widths[-1], latent))
        self.decode = nn.Sequential(
            *layers([latent, *hidden[::-1]]),
            nn.Linear([latent, *hidden[::-1]][-1], widths[0]),
            nn.Sigmoid(),
            nn.Unflatten(1, tuple(shape)),
        )


class ConvCoder(nn.Module):
    """Convolutions of stride 2 to `latent` numbers, transposed ones back.

    `encode` maps float [B, *shape], shape (C, H, W), to [B, latent], `decode` back, to 0..1.

    Raises:
        Failure: height or width can't be halved once for each of `widths`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        widths: list[PositiveInt],
        latent: PositiveInt = 32,
        activation: Activation = "relu",
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        parts = 2 ** len(widths)
        if height % parts or width % parts:
            raise Failure(f"model.network.widths: {len(widths)} halvings do not divide {height}x{width}; give fewer")
        small = (widths[-1] if widths else channels, height // parts, width // parts)
        sizes = [channels, *widths]
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for inputs, outputs in zip(sizes, widths, strict=False):
            encoder += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), activation_layer(activation)]
            decoder = [
                nn.ConvTranspose2d(outputs, inputs, 4, stride=2, padding=1),
                activation_layer(activation),
                *decoder,
            ]
        self.encode = nn.Sequential(*encoder, nn.Flatten(), nn.Dropout(dropout), nn.Linear(math.prod(small), latent))
        self.decode = nn.Sequential(
            nn.Linear(latent, math.prod(small)),
            activation_layer(activation),
            nn.Dropout(dropout),
            nn.Unflatten(1, small),
            *decoder[:-1],  # the last activation is the sigmoid
            nn.Sigmoid(),
        )


class Autoencoder(Model):
    """Learns to give images back: the least mean squared error over pixels in 0..1 (Hinton and Salakhutdinov, 2006)."""

    task = "reconstruction"

    def __init__(self, meta: Mapping[str, Any], *, network: Build, optimizer: Optimizer, schedule: Schedule) -> None:
        means = ("loss", "psnr")
        super().__init__(optimizer=optimizer, schedule=schedule, train=means, val=means)
        self.network: nn.Module = network(shape=meta["shape"])

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> the latent numbers, fp32 [B, latent]."""
        return self.network.encode(images.float() / 255).float()  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [B, C, H, W] in 0..1."""
        return self.network.decode(self.network.encode(images.float() / 255))  # type: ignore[operator]

    def answer(self, images: Tensor) -> Tensor:
        """The image that was read again from its latent numbers, fp32 [B, C, H, W] in 0..1."""
        return self(images).float()

    def loss(self, batch: tuple[Tensor, ...], split: Split) -> Tensor:
        """Mean squared error of a batch; adds to the epoch's means."""
        images = batch[0]
        errors = (self(images).float() - images.float() / 255).square().flatten(1).mean(1)  # [B]
        with torch.no_grad():
            self.add(split, len(images), loss=errors.sum(), psnr=psnr(errors).sum())
        return errors.mean()

    def step_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.loss(batch, "train")

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.loss(batch, "val")


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors over pixels in 0..1; at most 100, for no error at all."""
    return -10 * error.clamp_min(1e-10).log10()
