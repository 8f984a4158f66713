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
from src.training.checkpoints import AtomicCheckpointIO, is_finite
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
    """Makes a value infinite, as a step does whose loss was still a number: a weight, or Adam's second moment."""

    def __init__(self, part: str, step: int) -> None:
        self.part = part
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            weight = next(pl_module.parameters())
            moments = trainer.optimizers[0].state[weight]
            value = weight if self.part == "weight" else next(v for v in moments.values() if v.shape == weight.shape)
            with torch.no_grad():
                value.view(-1)[0] = float("inf")


@pytest.mark.parametrize("step", [6, 8], ids=["within an epoch", "before a validation"])
@pytest.mark.parametrize("part", ["weight", "optimizer"])
def test_values_that_are_not_finite_are_never_saved(part: str, step: int, tiny: Config, tmp_path: Path) -> None:
    config = with_trainer(tiny, checkpoint_seconds=0.0, keep="best")
    with pytest.raises(Failure, match="a weight or the optimizer's state became NaN or infinite in epoch 2"):
        train(config, tmp_path, Overflow(part, step))
    work = run.work_folder(config, packed.read_meta(config.processed), tmp_path)
    last = work.resumable()
    assert last
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == step - 1
    best = torch.load(work.path / "best.ckpt", weights_only=True)
    assert best["epoch"] == 0
    assert is_finite([saved["state_dict"], saved["optimizer_states"], best["state_dict"]])


def test_no_callback_writes_a_checkpoint_that_is_not_finite(tmp_path: Path) -> None:
    weights, path = torch.zeros(3), tmp_path / "any.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": weights}}, path)
    for key, value in (("state_dict", {"w": weights / 0}), ("optimizer_states", [{"state": {0: {"m": weights / 0}}}])):
        with pytest.raises(Failure, match="NaN or infinite"):
            AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": weights}, key: value}, path)
    assert bool((torch.load(path, weights_only=True)["state_dict"]["w"] == 0).all())


def test_gradients_are_clipped_before_a_step(tiny: Config, tmp_path: Path) -> None:
    class Norms(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            def note(*_: Any) -> None:
                norms.append(float(torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm()))  # type: ignore[union-attr]

            trainer.optimizers[0].register_step_post_hook(note)

    norms: list[float] = []
    train(with_trainer(tiny, gradient_clip=1e-3), tmp_path, Norms())
    assert norms == pytest.approx([1e-3] * 8, rel=1e-2)


# --- accumulated gradients, a limit of time ---------------------------------------------------------------------------


class Steps(Callback):
    """Counts the optimizer's steps and the schedule's, and ends the second epoch before a batch, as a kill does."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at = killed_at
        self.counts = (0, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == self.killed_at:
            raise Failure("killed")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedule: Any = trainer.lr_scheduler_configs[0].scheduler
        self.counts = (trainer.global_step, schedule.last_epoch)


@pytest.mark.parametrize("killed_at", [2, 3])
def test_accumulated_gradients_make_a_step_and_are_resumed_to_the_same_bits(
    killed_at: int, tiny: Config, tmp_path: Path
) -> None:
    """Three of an epoch's four batches make a step, the last one another; nothing is saved between two steps."""
    config = with_trainer(tiny, accumulate_grad_batches=3, checkpoint_seconds=0.0)
    steps = Steps()
    uninterrupted, _ = train(config, tmp_path / "uninterrupted", steps)
    assert steps.counts == (4, 4)
    assert uninterrupted.history.rows[-1]["lr"] == train(tiny, tmp_path / "plain")[0].history.rows[-1]["lr"]
    with pytest.raises(Failure, match="killed"):
        train(config, tmp_path / "killed", Steps(killed_at))
    resumed, _ = train(config, tmp_path / "killed", steps)
    assert steps.counts == (4, 4)
    assert resumed.optimizer_sha256 == uninterrupted.optimizer_sha256


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=mnist_gan"], "src.models.gan.GAN takes its optimizers' steps itself; use data.loader.batch_size"),
        (["experiment=mnist_mlp", "trainer=gpu"], "a CUDA graph takes an optimizer step each batch"),
    ],
)
def test_gradients_are_not_accumulated_where_lightning_takes_no_step(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([*overrides, "output=out", "trainer.accumulate_grad_batches=2"])
    assert str(refused.value).startswith(f"trainer.accumulate_grad_batches: {message}")


def test_a_limit_of_time_ends_a_training_with_a_complete_result(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_trainer(tiny, max_epochs=100_000, max_time="00:00:00:01", keep="best")
    trained, _ = train(config, tmp_path)
    epochs = len(trained.history.rows)
    assert 0 < epochs < 100_000
    assert {"train_loss", "val_loss", "val_accuracy"} <= trained.history.rows[-1].keys()
    assert f"trainer.max_time: 00:00:00:01 is over, in epoch {epochs} of 100000" in capsys.readouterr().out


def test_a_limit_of_time_that_trains_nothing_is_named(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"trainer\.max_time: 00:00:00:00 is over before anything was trained"):
        train(with_trainer(tiny, max_time="00:00:00:00"), tmp_path)
