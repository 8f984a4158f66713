"""What a model draws, shown as it gets better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

Show = Callable[[Mapping[str, Tensor], int], None]


class Progress(Callback):
    """After each validation hands the model's `showcase` of the first batch, uint8 [K, C, H, W] by name, to `show`."""

    def __init__(self, show: Show) -> None:
        self.show = show

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0 and trainer.is_global_zero:
            self.show(pl_module.showcase(batch), trainer.current_epoch + 1)  # type: ignore[operator]
