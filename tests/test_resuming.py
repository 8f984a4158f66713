"""Trainings in this process: interrupted anywhere and resumed, what is kept of them, what their epochs report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from src.configuration.schema import Config
from src.data import packed
from src.models.base import Model
from src.models.classifier import ImageClassifier
from src.training import determinism, run
from tests.tiny_data import noise_digits

BATCHES = 4  # of an epoch


class Killed(BaseException):
    """Stands for a SIGKILL: no handler catches it."""


class KillBefore(Callback):
    """Ends a training before its step of that number, counted from 0."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


class Recorder(Callback):
    """Records the images of each batch and each validation's labels."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.images.append(batch[0])

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.validated.append(batch[1])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three epochs of four augmented batches, with dropout; every batch is saved."""
    return noise_digits(
        tmp_path,
        "trainer.max_epochs=3",
        "trainer.checkpoint_seconds=0",
        "trainer.log_every=1",
        "data.loader.rotation=20",
        "model.network.dropout=0.5",
        "model.network.hidden=[16]",
        "model.optimizer={name: sgd, lr: 0.1, momentum: 0.9}",
    )


def train(config: Config, folder: Path, *callbacks: Callback) -> run.Trained:
    determinism.fix(config.seed, 1)
    meta = packed.read_meta(config.processed)
    return run.fit(config, meta, run.work_folder(config, meta, folder), lambda *_: None, callbacks)


def equal(first: LightningModule, second: LightningModule) -> bool:
    """Whether two models have the same weights to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(config: Config, tmp_path: Path) -> None:
    """Killed within an epoch, at the end of one, and twice in the last one."""
    expected = train(config, tmp_path / "whole")
    for step in (2, 4, 9, 10):
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", KillBefore(step))
    recorder = Recorder()
    resumed = train(config, tmp_path / "killed", recorder)
    assert len(recorder.images) == 3 * BATCHES - 10
    assert equal(resumed.model, expected.model)
    assert resumed.optimizer_sha256 == expected.optimizer_sha256
    assert resumed.history.rows == expected.history.rows


def test_a_resumed_training_on_the_same_batches_goes_on_with_these(config: Config, tmp_path: Path) -> None:
    """`trainer.overfit_batches`: two batches, again and again, whatever the epoch in which the run was killed."""
    changes = {"overfit_batches": 2, "limit_train_batches": 2}
    same = config.model_copy(update={"trainer": config.trainer.model_copy(update=changes)})
    expected = train(same, tmp_path / "whole")
    for step in (3, 4):
        with pytest.raises(Killed):
            train(same, tmp_path / "killed", KillBefore(step))
    assert equal(train(same, tmp_path / "killed").model, expected.model)


def test_another_seed_gives_another_training_of_the_same_weights(config: Config, tmp_path: Path) -> None:
    """The seed decides the order and the augmentation, not the initial weights alone."""
    images = []
    for seed in (0, 1):
        recorder = Recorder()
        train(config.model_copy(update={"seed": seed}), tmp_path / str(seed), recorder)
        images.append(torch.cat(recorder.images))
    assert not torch.equal(*images)


def test_each_batch_of_each_epoch_and_seed_has_its_own_random_state(config: Config, tmp_path: Path) -> None:
    states: set[bytes] = set()

    class States(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            states.add(torch.get_rng_state().numpy().tobytes())

    for seed in (0, 1):
        train(config.model_copy(update={"seed": seed}), tmp_path / str(seed), States())
    assert len(states) >= 2 * 3 * BATCHES


def test_a_validation_is_over_the_validation_split(config: Config, tmp_path: Path) -> None:
    recorder = Recorder()
    train(config, tmp_path, recorder)
    assert torch.cat(recorder.validated).tolist() == [index % 10 for index in range(21)] * 3


def test_the_means_of_an_epoch_are_its_own(config: Config, tmp_path: Path) -> None:
    """Over an epoch whose weights are zero the loss is that of guessing, whatever it was before."""

    class Zero(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.data.mul_(0.0 if trainer.current_epoch == 2 else 3.0)

        on_validation_start = on_train_batch_start

    still = config.model_copy(update={"trainer": config.trainer.model_copy(update={"gradient_clip": 1e-9})})
    *_, last = train(still, tmp_path, Zero()).history.rows
    guess = float(torch.tensor(10.0).log())
    assert (last["train_loss"], last["val_loss"]) == (pytest.approx(guess, rel=1e-3), pytest.approx(guess, rel=1e-3))


@pytest.mark.parametrize(("keep", "kept"), [("best", 1), ("last", 3)])
def test_the_weights_that_are_kept_are_those_of_the_epoch_that_is_reported(
    keep: str, kept: int, config: Config, tmp_path: Path
) -> None:
    weights: list[Tensor] = []

    class Worsen(Callback):
        """From the second epoch on the weights are blown up, and the validation is worse."""

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch:
                for parameter in pl_module.parameters():
                    parameter.data.mul_(5.0)
            weights.append(next(pl_module.parameters()).detach().clone())

    changes = {"keep": keep, "monitor": "val_loss"}
    chosen = config.model_copy(update={"trainer": config.trainer.model_copy(update=changes)})
    trained = train(chosen, tmp_path, Worsen())
    assert run.kept_row(chosen, trained.history.rows)["epoch"] == kept
    assert torch.equal(next(trained.model.parameters()), weights[kept - 1])


def test_the_seed_decides_the_initial_weights(config: Config) -> None:
    meta = packed.read_meta(config.processed)

    def model(seed: int) -> LightningModule:
        determinism.fix(seed, 1)
        module: LightningModule = config.model(meta)
        return module

    assert equal(model(1), model(1))
    assert not equal(model(1), model(2))


def test_a_digest_of_a_state_depends_on_each_part_of_it() -> None:
    def state(**changes: Any) -> dict[str, Any]:
        return {"moments": [torch.arange(3.0), torch.zeros(2)], "groups": {"lr": 0.1, "betas": (0.9, 0.99)}} | changes

    others = [
        state(),
        state(moments=[torch.arange(3.0) + 1, torch.zeros(2)]),
        state(moments=[torch.arange(3.0).bfloat16(), torch.zeros(2)]),
        state(moments=[torch.arange(3.0)[None], torch.zeros(2)]),
        state(moments=[torch.zeros(2), torch.arange(3.0)]),
        state(groups={"lr": 0.2, "betas": (0.9, 0.99)}),
        state(groups={"rate": 0.1, "betas": (0.9, 0.99)}),
    ]
    assert len({determinism.sha256_of_state(other) for other in others}) == len(others)
    assert determinism.sha256_of_state(state()) == determinism.sha256_of_state(others[0])


def test_only_a_run_that_begins_is_prepared(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network takes from the training images, such as whitening, is in its checkpoint."""
    prepared: list[int] = []
    monkeypatch.setattr(Model, "prepare", lambda self, split: prepared.append(len(split["labels"])))
    monkeypatch.delattr(ImageClassifier, "prepare")
    with pytest.raises(Killed):
        train(config, tmp_path, KillBefore(2))
    train(config, tmp_path)
    assert prepared == [40]
