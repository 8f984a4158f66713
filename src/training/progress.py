"""Pictures of a model's outputs during training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

Show = Callable[[Mapping[str, np.ndarray], Path], None]
Showcase = Callable[[LightningModule, Any], Mapping[str, Tensor]]


class Progress(Callback):
    """Passes a model's `showcase` of the first validation batch to `show`, for a picture in `folder`.

    A showcase is the task's: images, uint8 [K, C, H, W], by name, or none; `show` gets [K, H, W, C]. A new run clears
    the folder, a resumed one adds to it.
    """

    def __init__(self, folder: Path, showcase: Showcase, show: Show) -> None:
        self.folder = folder
        self.showcase = showcase
        self.show = show

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0 and (columns := self.showcase(pl_module, batch)):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.show(
                {name: images.permute(0, 2, 3, 1).cpu().numpy() for name, images in columns.items()},
                self.folder / f"epoch_{trainer.current_epoch + 1:03}.png",
            )
