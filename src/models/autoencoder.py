"""Autoencoders: an image pressed through a few numbers, and drawn again from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from src.common.errors import Failure
from src.configuration.schema import Activation, Build, Optimizer, PositiveInt, Probability, Schedule
from src.models.layers import activation_layer
from src.models.optimization import build_optimizer, build_schedule
from src.models.sums import Summing

SHOWN = 8  # images whose reconstructions are drawn after each validation


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
        dropout: Probability = 0.5,
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
        dropout: Probability = 0.0,
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


class Autoencoder(Summing):
    """Learns to give images back: the least mean squared error over pixels in 0..1 (Hinton and Salakhutdinov, 2006)."""

    task = "reconstruction"

    def __init__(self, meta: Mapping[str, Any], *, network: Build, optimizer: Optimizer, schedule: Schedule) -> None:
        super().__init__(train=(3,), val=(3,))  # sums over images of squared error and PSNR, count
        self.optimizer_config = optimizer
        self.schedule_config = schedule
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

    def showcase(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Images and their reconstructions, uint8 [K, C, H, W] each."""
        images = batch[0][:SHOWN]
        return {"input": images, "output": self.answer(images).mul(255).round().to(torch.uint8)}

    def loss(self, batch: tuple[Tensor, ...], sums: Tensor) -> Tensor:
        """Mean squared error of a batch; adds to `sums`."""
        images = batch[0]
        each = (self(images).float() - images.float() / 255).square().flatten(1).mean(1)
        with torch.no_grad():
            sums += torch.stack([each.sum(), psnr(each).sum(), each.new_full((), len(images))])
        return each.mean()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.train_sums)
        if batch_idx % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set at run time
            self.log("loss", loss, on_step=True, on_epoch=False, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.loss(batch, self.val_sums)

    def on_train_epoch_end(self) -> None:
        self._report("train")
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def _report(self, split: Literal["train", "val"]) -> None:
        error, ratio, count = self.take(split).tolist()
        self.log_dict({f"{split}_loss": error / max(1, count), f"{split}_psnr": ratio / max(1, count)})

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer([self], self.optimizer_config)
        schedule = build_schedule(optimizer, self.schedule_config, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors over pixels in 0..1; at most 100, for no error at all."""
    return -10 * error.clamp_min(1e-10).log10()
