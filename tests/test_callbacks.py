"""Callbacks that a configuration adds: checked before anything is imported, called in training, logged once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from src.common.errors import ConfigError, Failure
from src.configuration.composing import compose
from src.configuration.metrics import Metric
from src.configuration.schema import Config
from src.data import packed
from src.tasks import classification
from src.training import determinism, run
from tests.tiny_data import noise_digits

MONITOR = "{_target_: pytorch_lightning.callbacks.LearningRateMonitor, logging_interval: step}"


def composed(*overrides: str) -> Config:
    return compose(["experiment=cifar10_resnet", "output=out", *overrides])


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("{_target_: os.system, command: ls}", "only pytorch_lightning.callbacks.* and src.* are instantiated"),
        ("{_target_: pytorch_lightning.callbacks.LearningRateMonitr}", "has no class LearningRateMonitr; it has "),
        (
            "{_target_: pytorch_lightning.callbacks.LearningRateMonitor, interval: step}",
            "unknown argument interval; LearningRateMonitor takes log_momentum, log_weight_decay, logging_interval",
        ),
        (
            "{_target_: pytorch_lightning.callbacks.GradientAccumulationScheduler}",
            "missing argument scheduling of GradientAccumulationScheduler",
        ),
    ],
    ids=["foreign", "unknown", "argument", "missing"],
)
def test_a_callback_that_cannot_be_is_refused_in_one_line(callback: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed(f"trainer.callbacks.mine={callback}")
    (line,) = str(refused.value).splitlines()
    assert line.startswith("trainer.callbacks.mine")
    assert message in line


def test_a_callback_is_part_of_the_resolved_configuration() -> None:
    callbacks = composed(f"trainer.callbacks.lr={MONITOR}").plain()["trainer"]["callbacks"]
    assert callbacks == {
        "lr": {"_target_": "pytorch_lightning.callbacks.LearningRateMonitor", "logging_interval": "step"}
    }


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """A training of two epochs of four batches, for the digits of noise."""
    return noise_digits(tmp_path, "trainer.max_epochs=2", "trainer.log_every=1")


def train(config: Config, folder: Path, *callbacks: Callback) -> tuple[run.Trained, list[tuple[str, int]]]:
    """The result of a training, and the (metric, step) pairs that it logged."""
    points: list[tuple[str, int]] = []

    def log(metrics: Mapping[str, float], step: int) -> None:
        points.extend((key, step) for key in metrics)

    determinism.fix(config.seed, 1)
    meta = packed.read_meta(config.processed)
    work = run.work_folder(config, meta, folder)
    return run.fit(config, meta, work, log, callbacks), points


def with_trainer(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=changes)})


def test_a_monitor_of_learning_rates_logs_each_step_once_and_changes_no_bit(tiny: Config, tmp_path: Path) -> None:
    plain, before = train(tiny, tmp_path / "plain")
    callbacks = composed(f"trainer.callbacks.lr={MONITOR}").trainer.callbacks
    monitored, points = train(with_trainer(tiny, callbacks=callbacks), tmp_path / "monitored")
    assert len(points) == len(set(points))
    rates = [point for point in points if point[0].startswith("lr-")]
    assert len(rates) == 8 * len({name for name, _ in rates}) > 0
    assert {name for name, _ in rates} <= monitored.history.rows[-1].keys()
    assert [point for point in points if point not in rates] == before
    assert monitored.optimizer_sha256 == plain.optimizer_sha256


def test_a_monitor_that_is_never_logged_ends_the_first_epoch_with_those_that_are(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric that the task declares and this model does not log; any other is refused at composition."""
    monkeypatch.setitem(classification.METRICS, "f1", Metric("max", "F1", is_validated=True))
    for keep in ("last", "best"):
        config = with_trainer(tiny, monitor="val_f1", keep=keep)
        with pytest.raises(Failure, match=r"'val_f1' was not logged .*; these were: .*val_accuracy.*val_loss"):
            train(config, tmp_path / keep)


class Overflow(Callback):
    """Makes a weight infinite, as a step does whose loss was still a number."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 6:
            with torch.no_grad():
                next(pl_module.parameters()).view(-1)[0] = float("inf")


def test_weights_that_are_not_finite_are_never_saved(tiny: Config, tmp_path: Path) -> None:
    config = with_trainer(tiny, checkpoint_seconds=0.0)
    with pytest.raises(Failure, match="a weight became NaN or infinite in epoch 2"):
        train(config, tmp_path, Overflow())
    work = run.work_folder(config, packed.read_meta(config.processed), tmp_path)
    checkpoint = work.resumable()
    assert checkpoint
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 5
    assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())
