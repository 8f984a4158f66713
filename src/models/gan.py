"""Generative adversarial networks (Goodfellow et al., 2014): dense ones, and convolutional ones after DCGAN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from src.common.errors import Failure
from src.configuration.schema import Build, Dropout, NonNegative, Optimizer, PositiveInt, Probability, Schedule, Width
from src.models.adversarial import Adversarial, initialise, scaled
from src.models.base import Split
from src.models.fidelity import DrawnAgainstReal
from src.models.layers import activation_layer

DRAWN_AT_ONCE = 500  # images that validation draws


class DenseGenerator(nn.Module):
    """Dense layers with leaky ReLUs from latent numbers to pixels: float [B, latent] -> [B, *shape].

    In -1..1 with `output=tanh`; `linear` has no bounds, for rows of a table.
    """

    def __init__(
        self,
        latent: int,
        shape: Sequence[int],
        *,
        hidden: list[PositiveInt],
        output: Literal["tanh", "linear"] = "tanh",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip([latent, *hidden], hidden, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), activation_layer("leaky_relu")]
        last = nn.Linear([latent, *hidden][-1], math.prod(shape))
        bounds = nn.Tanh() if output == "tanh" else nn.Identity()
        self.layers = nn.Sequential(*layers, last, bounds, nn.Unflatten(1, tuple(shape)))

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class DenseDiscriminator(nn.Module):
    """Dense layers with leaky ReLUs from pixels to a judgement: float [B, *shape] -> logits [B, 1]."""

    def __init__(self, shape: Sequence[int], *, hidden: list[PositiveInt], dropout: Dropout = 0.0) -> None:
        super().__init__()
        sizes = [math.prod(shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(sizes, hidden, strict=False):
            layers += [nn.Linear(inputs, outputs), activation_layer("leaky_relu"), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvGenerator(nn.Module):
    """Two transposed convolutions from a quarter of the size (Radford et al., 2016).

    float [B, latent] -> [B, *shape] in -1..1, shape (C, H, W). `width` is that of the last hidden layer.

    Raises:
        Failure: height and width are no multiples of four.
    """

    def __init__(self, latent: int, shape: Sequence[int], *, width: Width = 64) -> None:
        super().__init__()
        channels, height, across = shape
        if height % 4 or across % 4:
            raise Failure(f"the convolutional GAN draws images whose sides are multiples of 4, not {height}x{across}")
        small = (2 * width, height // 4, across // 4)
        self.layers = nn.Sequential(
            nn.Linear(latent, math.prod(small), bias=False),
            nn.Unflatten(1, small),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.apply(initialise)

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class ConvDiscriminator(nn.Module):
    """Two convolutions of stride 2 with leaky ReLUs, and a dense layer: float [B, *shape] -> logits [B, 1].

    Without norms, so that each image is judged alone, as the gradient penalty wants it.
    """

    def __init__(self, shape: Sequence[int], *, width: Width = 64, dropout: Dropout = 0.0) -> None:
        super().__init__()
        channels, height, across = shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            activation_layer("leaky_relu"),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            activation_layer("leaky_relu"),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(2 * width * (height // 4) * (across // 4), 1),
        )
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class GAN(Adversarial):
    """A generator that learns to draw what a discriminator takes for real.

    `loss=vanilla` is cross-entropy, `lsgan` least squares, `wgan_gp` the Wasserstein distance with the penalty
    (|grad D(x)| - 1)^2 times `penalty` between real and drawn images (Gulrajani et al., 2017). The generator learns at
    each `critic_steps`-th batch. `label_smoothing` is one-sided: real images are to be judged 1 minus so much.

    After each epoch as many drawn images are compared with those of the validation split: `val_frechet` is the Frechet
    distance of their pixels at 7x7, `val_diversity` how unlike each other they are; each over the whole split, whatever
    the batch size and the number of processes.
    """

    task = "generation"

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        generator: Build,
        discriminator: Build,
        optimizer: Optimizer,
        schedule: Schedule,
        latent: PositiveInt = 64,
        loss: Literal["vanilla", "lsgan", "wgan_gp"] = "vanilla",
        label_smoothing: Probability = 0.0,
        penalty: NonNegative = 10.0,
        critic_steps: PositiveInt = 1,
    ) -> None:
        super().__init__(
            optimizer=optimizer,
            schedule=schedule,
            gan=loss,
            train=("generator_loss", "discriminator_loss", "real_judgement", "drawn_judgement"),
            val=(),
        )
        self.drawn_against_real = self.distances()
        self.latent = latent
        self.label_smoothing = label_smoothing
        self.penalty = penalty
        self.critic_steps = critic_steps
        self.generator: nn.Module = generator(latent=latent, shape=meta["shape"])
        self.discriminator: nn.Module = discriminator(shape=meta["shape"])

    def distances(self) -> DrawnAgainstReal:
        """What compares generated examples with the validation split."""
        return DrawnAgainstReal()

    def real(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The real examples of a batch as the discriminator sees them: fp32 [B, C, H, W] in -1..1."""
        return scaled(batch[0], torch.float32)

    def forward(self, latent: Tensor) -> Tensor:
        """float [B, latent] -> float [B, C, H, W] in 0..1."""
        return (self.generator(latent) + 1) / 2

    def answer(self, latent: Tensor) -> Tensor:
        """The images, fp32 [B, C, H, W] in 0..1."""
        return self(latent).float()

    def draw_latents(self, count: int, seed: int) -> Tensor:
        """What images are drawn from: fp32 [count, latent], the same for the same seed, wherever the model is."""
        drawn = torch.randn(count, self.latent, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device)

    def variant(self, batch_idx: int) -> int:
        return int(batch_idx % self.critic_steps == 0)  # whether the generator learns

    def step(self, batch: tuple[Tensor, ...], optimizers: Sequence[Any], variant: int) -> dict[str, Tensor]:
        real = self.real(batch)
        for_generator, for_discriminator = optimizers
        drawn = self.generator(torch.randn(len(real), self.latent, device=real.device))

        with self.learning(for_discriminator):
            seen_real, seen_drawn = self.discriminator(real).float(), self.discriminator(drawn.detach()).float()
            if self.gan == "wgan_gp":
                against = seen_drawn.mean() - seen_real.mean()
                against = against + self.penalty * self.steepness(real, drawn.detach().float())
            else:
                smoothing = self.label_smoothing
                against = (self.judged(seen_real, True, smoothing) + self.judged(seen_drawn, False)) / 2
            self.descend(for_discriminator, against)
        losses = {"loss_discriminator": against}
        self.add(
            "train",
            len(real),
            discriminator_loss=against * len(real),
            real_judgement=seen_real.mean() * len(real),
            drawn_judgement=seen_drawn.mean() * len(real),
        )

        if variant:
            with self.learning(for_generator):
                seen = self.discriminator(drawn).float()
                loss = -seen.mean() if self.gan == "wgan_gp" else self.judged(seen, True)
                self.descend(for_generator, loss)
            losses["loss_generator"] = loss
            self.add("train", len(real), generator_loss=loss * len(real))
        return losses

    def steepness(self, real: Tensor, drawn: Tensor) -> Tensor:
        """How far the critic's slope is from 1 on the way from drawn to real images: the mean of (|grad| - 1)^2."""
        share = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
        between = (share * real + (1 - share) * drawn).requires_grad_()
        with torch.autocast(real.device.type, enabled=False):  # a gradient's gradient wants all its digits
            judged = self.discriminator.forward(between)  # not the compiled call: it can't be differentiated twice
        (slope,) = torch.autograd.grad(judged.sum(), between, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.drawn_against_real.update(real=batch[0])

    def on_validation_epoch_end(self) -> None:
        """Draws as many images as were real, each process its share of them, and compares the two sets."""
        counts: Any = self.all_gather(torch.tensor(self.drawn_against_real.real_count, device=self.device))
        latents = self.draw_latents(int(counts.sum()), seed=0)
        for part in latents[self.global_rank :: self.trainer.world_size].split(DRAWN_AT_ONCE):
            self.drawn_against_real.update(drawn=self.answer(part))
        distances = self.drawn_against_real.compute()
        self.drawn_against_real.reset()
        self.log_dict({f"val_{name}": value for name, value in distances.items()})

    def report(self, split: Split) -> dict[str, float]:
        means = super().report(split)
        if split == "train" and self.gan == "wgan_gp":  # the critic's estimate of the Wasserstein distance
            self.log("train_wasserstein", means["train_real_judgement"] - means["train_drawn_judgement"])
        return means
