"""Classifiers as Lightning modules: what images and texts have in common, and the one for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import Build, Optimizer, Probability, Schedule
from src.models.optimization import build_optimizer, build_schedule
from src.models.sums import Summing


class Classifier(Summing):
    """Cross-entropy training of `self.network`; the last element of a batch is the labels, int64 [B]."""

    task = "classification"

    def __init__(self, *, optimizer: Optimizer, schedule: Schedule, label_smoothing: Probability = 0.0) -> None:
        super().__init__(train=(3,), val=(3,))  # loss sum, correct, count
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.label_smoothing = label_smoothing

    def answer(self, *inputs: Tensor) -> Tensor:
        """Class probabilities, fp32 [B, classes]."""
        return self(*inputs).float().softmax(1)

    def loss(self, batch: tuple[Tensor, ...], sums: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of a batch; adds to `sums`."""
        *inputs, labels = batch
        logits = self(*inputs).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        with torch.no_grad():
            sums += torch.stack(
                [loss * len(labels), (logits.argmax(1) == labels).sum(), loss.new_full((), len(labels))]
            )
        return loss

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.train_sums, self.label_smoothing)
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
        loss, correct, count = self.take(split).tolist()
        self.log_dict({f"{split}_loss": loss / max(1, count), f"{split}_accuracy": correct / max(1, count)})

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer([self], self.optimizer_config)
        schedule = build_schedule(optimizer, self.schedule_config, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ImageClassifier(Classifier):
    """Classifies images: bytes are normalised by the training part's mean and deviation, then go through `network`."""

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        network: Build,
        optimizer: Optimizer,
        schedule: Schedule,
        label_smoothing: Probability = 0.0,
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
        return self.network((images.to(self.mean.dtype) - self.mean) / self.std)

    def prepare(self, images: Tensor) -> None:
        """Shows the network training images, uint8 [N, C, H, W], before the first step, if it wants to see some."""
        fit = getattr(self.network, "fit_whitening", None)
        if fit is not None:
            fit((images.to(self.mean.dtype) - self.mean) / self.std)
