"""The base of all models: means over an epoch by name, and figures that are no means, through interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric

from src.configuration.composing import compose
from src.configuration.schema import Adam, Constant
from src.data import packed
from src.data.datamodule import PackedData
from src.data.kinds.images import ImageBatches, ImageLoader
from src.models.base import Model
from src.models.optimization import rate_factor
from tests.tiny_data import noise_digits


class Tiny(Model):
    """Gathers the labels of an epoch, as a metric over entities or boxes would gather them."""

    def __init__(self) -> None:
        adam, constant = Adam(name="adam", lr=0.01), Constant(name="constant")
        super().__init__(optimizer=adam, schedule=constant, train=("loss", "first", "second"), val=("loss",))
        self.layer = nn.Linear(4, 1)
        self.labels = CatMetric()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, labels = batch
        self.labels.update(labels.float())
        loss = self.layer(images.flatten(1).float()).square().mean()
        self.add("train", len(labels), loss=loss * len(labels))
        return loss


class Interrupted(pl.Callback):
    """Saves a checkpoint after two batches and ends the run; or notes the state that a resumed run starts from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: tuple[list[float], Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.path.exists():
            self.state = (sorted(pl_module.labels.compute().tolist()), pl_module.train_sums.clone())
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *arguments: Any) -> None:
        if arguments[-1] == 1 and not self.path.exists():
            self.state = (sorted(pl_module.labels.compute().tolist()), pl_module.train_sums.clone())
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A trainer on the CPU that trains and nothing else."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(callback: Interrupted, checkpoint: Path | None = None) -> None:
    torch.manual_seed(0)
    split = {"images": torch.zeros(8, 1, 2, 2, dtype=torch.uint8), "labels": torch.arange(8)}
    batches = ImageBatches(split, {"kind": "images"}, ImageLoader(batch_size=2), train=True)
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(Tiny(), batches, ckpt_path=checkpoint, weights_only=False)


def test_what_an_epoch_gathered_is_part_of_a_checkpoint_be_it_a_mean_or_a_metric(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    interrupted, resumed = Interrupted(path), Interrupted(path)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run(interrupted)
    run(resumed, path)
    assert interrupted.state is not None
    assert resumed.state is not None
    assert len(interrupted.state[0]) == 4
    assert resumed.state[0] == interrupted.state[0]
    assert float(interrupted.state[1][0, 1]) == 4
    assert torch.equal(resumed.state[1], interrupted.state[1])


class Rates(pl.Callback):
    """Records the rate of each step, by optimizer."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])


@pytest.mark.parametrize(("experiment", "optimizers"), [("mnist_mlp", 1), ("mnist_autoencoder", 1), ("mnist_gan", 2)])
def test_every_model_s_rate_follows_its_schedule_over_the_complete_run(
    experiment: str, optimizers: int, tmp_path: Path
) -> None:
    noise_digits(tmp_path)
    schedule = "model.schedule={name: linear, warmup: 0.25, final: 0.1}"
    sizes = ("data.loader.batch_size=20", "model.optimizer.lr=0.01")
    config = compose([f"experiment={experiment}", "output=out", f"data_folder={tmp_path}", schedule, *sizes])
    rates = Rates()
    trainer = quiet_trainer(max_epochs=4, limit_val_batches=0, callbacks=[rates])
    model = config.model(packed.read_meta(config.processed))
    trainer.fit(model, PackedData(config.processed, config.loader, config.seed))
    expected = [0.01 * rate_factor(model.schedule_config, (step + 0.5) / 8) for step in range(8)]
    assert [rate for rate, *_ in rates.rates] == pytest.approx(expected)
    assert all(step == [step[0]] * optimizers for step in rates.rates)


def test_means_are_added_by_name_alone_or_with_their_neighbours() -> None:
    model = Tiny()
    model.add("train", 3, first=torch.tensor(6.0), second=torch.tensor(9.0))
    model.add("train", 1, first=torch.tensor(2.0))
    assert model.train_sums.tolist() == [[0, 0], [8, 4], [9, 3]]
    with pytest.raises(ValueError, match="loss, second are no neighbours in loss, first, second"):
        model.add("train", 1, loss=torch.tensor(1.0), second=torch.tensor(1.0))
