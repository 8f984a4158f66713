"""What a run on a GPU does beside computing, tried on the CPU: graphs, the warm-up, saves by the clock, views."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.common.signals import Interruption
from src.data import augmentation, packed
from src.models.step_graphs import StepGraph, StepGraphs
from src.scoring.views import averaged_logits
from src.training import determinism, run
from src.training.interruption import WorkingCheckpoint
from tests.tiny_data import noise_digits

pytestmark = pytest.mark.usefixtures("restore_deterministic_mode")

GAN = ("model=dcgan", "trainer.monitor=val_frechet", "model.generator.width=4", "model.discriminator.width=4")
MODELS = {
    "classifier": (),
    "classifier with muon": ("model=fast_resnet", "model.network.width=4"),
    "clipped autoencoder": ("model=autoencoder_dense", "trainer.monitor=val_loss", "trainer.gradient_clip=0.1"),
    "gan": GAN,
    "gan whose generator learns at every second batch": (*GAN, "model.loss=wgan_gp", "model.critic_steps=2"),
}


class Rehearsed:
    """Stands in for CUDA's capture: a captured step has no effect, and a replay takes it again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.captures = 0

    def __call__(self, step: Callable[[Any], dict[str, Tensor]], batch: tuple[Tensor, ...]) -> StepGraph:
        self.captures += 1
        states = [part for o in self.model.trainer.optimizers for state in o.state.values() for part in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *(s for s in states if isinstance(s, Tensor))]
        before, random = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
        losses = {name: loss.detach().clone() for name, loss in step(batch).items()}
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

        def replay() -> None:
            for name, loss in step(batch).items():
                losses[name].copy_(loss.detach())

        return StepGraph(replay, batch, losses)


class Always(StepGraphs):
    """Takes each step as prepared for graphs, without one."""

    def take(self, step: Any, batch: Any, optimizers: Any, variant: Any = None) -> dict[str, Tensor]:
        self.has_begun = False
        return super().take(step, batch, optimizers, variant)


def trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, graphs: Callable[[Any], StepGraphs] | None = None
) -> tuple[str, str, list[Any]]:
    """The digests of weights and optimizers, and the history, of a short training."""
    config = noise_digits(folder, "trainer.max_epochs=2", "trainer.precision=32", *overrides)
    determinism.fix(config.seed, 1)
    meta = packed.read_meta(config.processed)
    monkeypatch.setattr(run, "step_graphs", lambda trainer, model: graphs(model) if graphs else None)
    work = run.work_folder(config, meta, folder / "work")
    result = run.fit(config, meta, work, lambda metrics, step: None)
    work.remove_checkpoints()
    return determinism.sha256_of_state(result.model.state_dict()), result.optimizer_sha256, result.history.rows


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_replayed_steps_have_the_bits_of_steps_that_were_taken_one_by_one(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[Rehearsed] = []

    def graphs(model: Any) -> StepGraphs:
        captures.append(Rehearsed(model))
        return StepGraphs(captures[-1])

    expected = trained(tmp_path, monkeypatch, *overrides, graphs=lambda model: Always())
    assert trained(tmp_path, monkeypatch, *overrides, graphs=graphs) == expected
    assert captures[-1].captures == (2 if "model.critic_steps=2" in overrides else 1)


def test_the_rate_of_replayed_steps_follows_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate that was a number when the step was captured, every step would have the same."""
    plain = trained(tmp_path, monkeypatch)[2]
    replayed = trained(tmp_path, monkeypatch, graphs=lambda model: StepGraphs(Rehearsed(model)))[2]
    for ours, theirs in zip(replayed, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_optimizer_that_cannot_be_captured_steps_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmsprop = "model.optimizer={_target_: torch.optim.RMSprop, lr: 0.001}"
    captures: list[Rehearsed] = []

    def graphs(model: Any) -> StepGraphs:
        captures.append(Rehearsed(model))
        return StepGraphs(captures[-1])

    assert trained(tmp_path, monkeypatch, rmsprop, graphs=graphs) == trained(tmp_path, monkeypatch, rmsprop)
    assert captures[-1].captures == 0


@pytest.mark.parametrize("overrides", [(), MODELS["classifier with muon"], GAN], ids=["classifier", "muon", "gan"])
def test_a_warm_up_changes_no_bit(overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(tmp_path, monkeypatch, *overrides)
    monkeypatch.setattr(run, "on_one_gpu", lambda trainer: True)
    assert trained(tmp_path, monkeypatch, *overrides) == expected


# --- saves ------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_saved_only_if_seconds_have_passed_and_saving_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saves = 0.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def save(path: Path, weights_only: bool) -> None:
        nonlocal now
        saves.append(now)
        now += 1.0

    trainer: Any = SimpleNamespace(
        world_size=1,
        should_stop=False,
        current_epoch=0,
        max_epochs=1000,
        callback_metrics={},
        optimizers=[],
        save_checkpoint=save,
    )
    callback = WorkingCheckpoint(tmp_path / "last.ckpt", seconds=60, interruption=Interruption())
    model: Any = nn.Linear(2, 2)
    for _ in range(200):  # epochs of a second
        now += 1
        callback.on_train_epoch_end(trainer, model)
    assert saves == [5.0, 56.0, 107.0, 158.0]  # after five seconds, then when a save of one second is 2 % of the time


# --- pictures ---------------------------------------------------------------------------------------------------------


class FirstPixels(nn.Module):
    """Logits that are the pixels of the first row."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0].float()


def test_views_are_averaged_with_their_weights() -> None:
    images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    model = FirstPixels()
    row = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert torch.equal(averaged_logits(model, images, "none"), row)
    assert torch.equal(averaged_logits(model, images, "mirror"), (row + row.flip(1)) / 2)
    up_left, down_right = torch.tensor([[5.0, 4.0, 5.0, 6.0]]), torch.tensor([[5.0, 6.0, 7.0, 6.0]])
    moved = (up_left + up_left.flip(1) + down_right + down_right.flip(1)) / 4
    assert torch.equal(averaged_logits(model, images, "six_views"), ((row + row.flip(1)) / 2 + moved) / 2)


def test_a_cut_out_square_has_the_colour_and_lies_within_the_image() -> None:
    images = torch.zeros(500, 3, 10, 8, dtype=torch.uint8)
    colour = torch.tensor([1, 2, 3], dtype=torch.uint8)
    cut = augmentation.cut_out(images, 4, colour, torch.Generator().manual_seed(0))
    covered = cut[:, 0] == 1
    assert torch.equal(cut, covered[:, None] * colour[:, None, None])
    assert covered.flatten(1).sum(1).tolist() == [16] * 500
    assert covered.any(0).all()  # every pixel in some image
