"""The packed training and validation splits as a Lightning DataModule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningDataModule

from src.configuration.schema import Loader
from src.data.batching import Batches, batches

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class PackedData(LightningDataModule):
    """The packed train and val splits for a trainer, resident on its device.

    Its state is how far the epoch has gone, so that a checkpoint taken in mid-epoch resumes with the batch that was
    next.
    """

    def __init__(self, folder: Path, loader: Loader, seed: int, *, same_batches: bool = False) -> None:
        super().__init__()
        self.folder = folder
        self.loader = loader
        self.seed = seed
        self.same_batches = same_batches  # every epoch is epoch 0 again: a network must be able to learn it by heart
        self.position = (0, 0)  # epoch, batches consumed of it

    def train_dataloader(self) -> Batches:
        train = self._batches("train", train=True)
        epoch, train.skip = self.position
        train.epoch = 0 if self.same_batches else epoch
        train.frozen = self.same_batches
        return train

    def val_dataloader(self) -> Batches:
        return self._batches("val", train=False)

    def _batches(self, split: str, train: bool) -> Batches:
        trainer: Trainer = self.trainer  # type: ignore[assignment]
        split_batches = batches(
            self.folder,
            split,
            self.loader,
            train=train,
            seed=self.seed,
            epochs=trainer.max_epochs or 0,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return split_batches.to(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        trainer: Trainer = self.trainer  # type: ignore[assignment]
        # Not `completed`, which Lightning counts after the hooks of a batch's end, where checkpoints are taken.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        consumed = progress.processed % trainer.num_training_batches  # at its end the next epoch has consumed none
        return {"epoch": trainer.current_epoch, "consumed": consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = (state_dict["epoch"], state_dict["consumed"])
