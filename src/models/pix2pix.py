"""pix2pix (Isola et al., 2017): a U-Net draws, a PatchGAN judges patches of 70x70 pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import Failure
from src.configuration.schema import Dropout, NonNegative, Optimizer, Schedule, Width
from src.models.adversarial import Adversarial, initialise, scaled


def _norm(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.InstanceNorm2d(width, affine=True)


class UNet(nn.Module):
    """The generator: float [B, 3, S, S] in -1..1 -> [B, 3, S, S] in -1..1, S a power of two, at least 32.

    Halves the picture down to one pixel, doubling `width` up to eight times itself, and back, with skips between layers
    of one size. Dropout on the way up is the model's noise: it stands where eight widths stay eight widths, but not in
    the innermost layer. At 256 and width 64 that is three layers, and with batch normalisation the authors' `unet_256`
    with its 54,413,955 parameters.

    Raises:
        Failure: for another size.
    """

    def __init__(self, size: int, width: int = 64, norm: str = "batch", dropout: float = 0.5) -> None:
        super().__init__()
        depth = size.bit_length() - 1
        if size != 2**depth or depth < 5:
            raise Failure(
                f"the U-Net takes pictures whose side is a power of two from 32 on, not {size}: set data.size"
            )
        widths = [width * min(2**level, 8) for level in range(depth)]
        bias = norm == "instance"  # batch normalisation subtracts a bias again
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level in range(depth):
            inner = 0 < level < depth - 1  # neither on the picture itself nor on the single pixel is there a norm
            self.down.append(
                nn.Sequential(
                    *([nn.LeakyReLU(0.2)] if level else []),
                    nn.Conv2d(widths[level - 1] if level else 3, widths[level], 4, stride=2, padding=1, bias=bias),
                    *([_norm(norm, widths[level])] if inner else []),
                )
            )
        for level in reversed(range(depth)):
            outputs = widths[level - 1] if level else 3
            inputs = widths[level] * (1 if level == depth - 1 else 2)
            self.up.append(
                nn.Sequential(
                    nn.ReLU(),
                    nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=bias or not level),
                    *([_norm(norm, outputs)] if level else [nn.Tanh()]),
                    *([nn.Dropout(dropout)] if 4 <= level < depth - 1 else []),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        x = self.up[0](skips.pop())
        for layer in list(self.up)[1:]:
            x = layer(torch.cat([x, skips.pop()], dim=1))
        return x


class PatchGAN(nn.Module):
    """The discriminator: input and picture, float [B, 6, S, S] -> logits [B, 1, S/8 - 2, S/8 - 2].

    Each is for a patch of 70x70.
    """

    def __init__(self, width: int = 64, norm: str = "batch") -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(6, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers += [
                nn.Conv2d(inputs, 2 * inputs, 4, stride=stride, padding=1, bias=norm == "instance"),
                _norm(norm, 2 * inputs),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, source: Tensor, picture: Tensor) -> Tensor:
        return self.layers(torch.cat([source, picture], dim=1))


class Pix2Pix(Adversarial):
    """Trains generator and discriminator in turn, one step each per batch.

    The discriminator's loss is halved, which slows it; the generator's is the GAN's plus `l1` times the mean absolute
    error.
    """

    task = "translation"
    generator: UNet
    discriminator: PatchGAN

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        optimizer: Optimizer,
        schedule: Schedule,
        gan: Literal["vanilla", "lsgan"] = "vanilla",
        l1: NonNegative = 100.0,
        width: Width = 64,
        norm: Literal["batch", "instance"] = "instance",
        dropout: Dropout = 0.5,
    ) -> None:
        super().__init__(
            optimizer=optimizer,
            schedule=schedule,
            gan=gan,
            train=("generator_loss", "discriminator_loss", "l1"),
            val=("l1",),
        )
        self.l1 = l1
        self.generator = UNet(meta["shape"][-1], width, norm, dropout)
        self.discriminator = PatchGAN(width, norm)
        self.apply(initialise)

    def forward(self, source: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float [B, 3, S, S] in 0..1."""
        return (self.generator(scaled(source, cast(torch.dtype, self.dtype))) + 1) / 2

    def answer(self, source: Tensor) -> Tensor:
        """The picture, fp32 [B, 3, S, S] in 0..1."""
        return self(source).float()

    def step(self, batch: tuple[Tensor, ...], optimizers: Sequence[Any], variant: int) -> dict[str, Tensor]:
        source, target = (scaled(side, cast(torch.dtype, self.dtype)) for side in batch)
        for_generator, for_discriminator = optimizers
        drawn = self.generator(source)

        with self.learning(for_discriminator):
            seen_real = self.judged(self.discriminator(source, target), True)
            seen_drawn = self.judged(self.discriminator(source, drawn.detach()), False)
            against = (seen_real + seen_drawn) / 2
            self.descend(for_discriminator, against)

        with self.learning(for_generator):
            distance = F.l1_loss(drawn.float(), target.float())
            loss = self.judged(self.discriminator(source, drawn), True) + self.l1 * distance
            self.descend(for_generator, loss)

        # L1 in 0..1, as val_l1 is: the networks work on -1..1.
        count = len(source)
        self.add(
            "train",
            count,
            generator_loss=loss * count,
            discriminator_loss=against * count,
            l1=distance / 2 * count,
        )
        return {"loss_generator": loss, "loss_discriminator": against}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        source, target = batch
        self.add("val", len(source), l1=F.l1_loss(self(source).float(), target.float() / 255) * len(source))
