"""The base of models with a generator and a discriminator that train against each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import Optimizer, Schedule
from src.models.base import Model
from src.models.optimization import build_optimizer, build_schedule


class Adversarial(Model):
    """A `generator` and a `discriminator`, each with an optimizer of its own, in this order.

    `gan=vanilla` is cross-entropy (with the non-saturating generator's loss), `lsgan` least squares (Mao et al., 2017).
    """

    automatic_optimization = False  # composition reads it

    generator: nn.Module
    discriminator: nn.Module

    def __init__(
        self, *, optimizer: Optimizer, schedule: Schedule, gan: str, train: Sequence[str], val: Sequence[str]
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, train=train, val=val)
        self.gan = gan

    def judged(self, logits: Tensor, real: bool, smoothing: float = 0.0) -> Tensor:
        """The loss of judgements, logits, whose target is 1 - smoothing for real images and 0 for drawn ones."""
        target = torch.full_like(logits, 1.0 - smoothing if real else 0.0)
        loss = F.binary_cross_entropy_with_logits if self.gan == "vanilla" else F.mse_loss
        return loss(logits.float(), target.float())

    @contextlib.contextmanager
    def learning(self, optimizer: Any) -> Iterator[None]:
        """Within it, only that optimizer's network has gradients."""
        self.toggle_optimizer(optimizer)
        yield
        self.untoggle_optimizer(optimizer)

    def step(self, batch: tuple[Tensor, ...], optimizers: Sequence[Any], variant: int) -> dict[str, Tensor]:
        """Trains both networks on a batch, and adds to the epoch's means; the losses to log, by name."""
        raise NotImplementedError

    def variant(self, batch_idx: int) -> int:
        """Which of several steps a batch is trained with."""
        return 0

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        variant = self.variant(batch_idx)
        counting: Any = self.optimizers()  # Lightning's wrappers, which count the steps
        if self.step_graphs is None:
            losses = self.step(batch, counting, variant)
        else:
            optimizers: Any = self.optimizers(use_pl_optimizer=False)
            step = partial(self.step, optimizers=optimizers, variant=variant)
            losses = self.step_graphs.take(step, batch, optimizers, variant)
            for optimizer in counting:
                optimizer.zero_grad()
                optimizer.step()  # without a gradient it changes nothing
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        self.log_losses(batch_idx, **losses)

    def descend(self, optimizer: Any, loss: Tensor) -> None:
        """One step down the loss."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.gradient_clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [build_optimizer([part], self.optimizer_config) for part in (self.generator, self.discriminator)]
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizers, [build_schedule(optimizer, self.schedule_config, steps) for optimizer in optimizers]


def initialise(module: nn.Module) -> None:
    """DCGAN's and pix2pix's initial weights: N(0, 0.02) for convolutions, N(1, 0.02) for the norms' scales."""
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
