"""What models share whose generator and discriminator learn against each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import Optimizer, Schedule
from src.models.optimization import build_optimizer, build_schedule
from src.models.sums import Summing


class Adversarial(Summing):
    """A `generator` and a `discriminator`, each with an optimizer of its own, in this order.

    `gan=vanilla` is cross-entropy (with the non-saturating generator's loss), `lsgan` least squares (Mao et al., 2017).
    """

    generator: nn.Module
    discriminator: nn.Module

    def __init__(
        self, *, optimizer: Optimizer, schedule: Schedule, gan: str, train: tuple[int, ...], val: tuple[int, ...]
    ) -> None:
        super().__init__(train=train, val=val)
        self.automatic_optimization = False
        self.gradient_clip: float | None = None  # a norm; with manual optimization Lightning does not clip by itself
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.gan = gan

    def judged(self, logits: Tensor, real: bool, smoothing: float = 0.0) -> Tensor:
        """How far judgements are from `real`, or from 1 - smoothing where that is asked of what is real."""
        wanted = torch.full_like(logits, 1.0 - smoothing if real else 0.0)
        loss = F.binary_cross_entropy_with_logits if self.gan == "vanilla" else F.mse_loss
        return loss(logits.float(), wanted.float())

    @contextlib.contextmanager
    def learning(self, optimizer: Any) -> Iterator[None]:
        """Within it, that optimizer's network alone gathers gradients."""
        self.toggle_optimizer(optimizer)
        yield
        self.untoggle_optimizer(optimizer)

    def descend(self, optimizer: Any, loss: Tensor) -> None:
        """One step down the loss."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.gradient_clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip, gradient_clip_algorithm="norm")
        optimizer.step()

    def step_schedules(self) -> None:
        """To be called once a batch."""
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()

    def report(self, split: Literal["train", "val"], *names: str) -> dict[str, float]:
        """Logs and returns the epoch's means; the sums hold, for each name, a sum and its count."""
        rows = self.take(split).tolist()
        means = {name: total / max(1, count) for name, (total, count) in zip(names, rows, strict=True)}
        self.log_dict(means)
        return means

    def configure_optimizers(self) -> Any:
        optimizers = [build_optimizer([part], self.optimizer_config) for part in (self.generator, self.discriminator)]
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizers, [build_schedule(optimizer, self.schedule_config, steps) for optimizer in optimizers]


def add(sums: Tensor, values: Tensor, count: int) -> None:
    """Adds means over `count` examples to rows of (sum, count)."""
    sums[:, 0] += values * count
    sums[:, 1] += count


def initialise(module: nn.Module) -> None:
    """DCGAN's and pix2pix's beginning: N(0, 0.02) for convolutions, N(1, 0.02) for the norms' scales."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def scaled(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 0..255 -> -1..1."""
    return images.to(dtype) / 127.5 - 1
