"""GANs: update schedule, losses, metrics of fidelity and diversity, detection of collapse."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import Failure
from src.configuration.composing import compose
from src.configuration.schema import SGD, Adam, Constant
from src.data import packed
from src.data.kinds.images import ImageBatches, ImageLoader
from src.data.writing import write_packed
from src.exporting import onnx_export
from src.models.fidelity import DrawnAgainstReal, diversity, frechet_distance, precision_recall
from src.models.gan import GAN, ConvDiscriminator, ConvGenerator, DenseDiscriminator, DenseGenerator
from src.scoring.image_classifier import judgements, train_judge
from src.tasks import generation

SHAPE = [1, 8, 8]
PARTS: dict[str, Any] = {
    "dense": {
        "generator": lambda latent, shape: DenseGenerator(latent, shape, hidden=[12]),
        "discriminator": lambda shape: DenseDiscriminator(shape, hidden=[12]),
    },
    "conv": {
        "generator": lambda latent, shape: ConvGenerator(latent, shape, width=4),
        "discriminator": lambda shape: ConvDiscriminator(shape, width=4),
    },
}


def gan(kind: str = "dense", **options: Any) -> GAN:
    torch.manual_seed(0)
    adam, constant = Adam(name="adam", lr=0.01, beta1=0.5), Constant(name="constant")
    return GAN({"shape": SHAPE}, **PARTS[kind], optimizer=adam, schedule=constant, latent=6, **options)


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batches(train: bool) -> ImageBatches:
    """16 images, in four batches for training or two for validation."""
    split = {"images": images(), "labels": torch.zeros(16, dtype=torch.int64)}
    loader = ImageLoader(batch_size=4, eval_batch_size=8)
    return ImageBatches(split, {"kind": "images"}, loader, train=train)


def fit(model: GAN, *callbacks: pl.Callback, epochs: int = 1) -> pl.Trainer:
    """Trains with Lightning on four batches an epoch."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches(train=True), batches(train=False))
    return trainer


@pytest.mark.parametrize("kind", PARTS)
def test_latents_are_reproducible_and_become_images(kind: str) -> None:
    model = gan(kind).eval()
    latents = model.draw_latents(5, seed=3)
    assert torch.equal(latents, model.draw_latents(5, seed=3))
    assert not torch.equal(latents, model.draw_latents(5, seed=4))
    drawn = model.answer(latents).detach()
    assert drawn.shape == (5, *SHAPE)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    assert model.discriminator(drawn).shape == (5, 1)
    showcase = generation.TASK.showcase(model, (images(2),))["drawn"]
    assert (showcase.dtype, len(showcase)) == (torch.uint8, 64)


@pytest.mark.parametrize("kind", PARTS)
def test_the_generator_is_exported(kind: str, tmp_path: Path) -> None:
    model = gan(kind)
    task = generation.TASK
    inputs = task.inputs("images")
    examples = onnx_export.example_inputs(inputs, task.batches(model.eval(), batches(train=False)))
    assert [len(batch[0]) for batch in examples] == [32, 32, 32]
    onnx_export.write(model, inputs, task.outputs, examples, tmp_path / "m.onnx")
    assert onnx_export.largest_difference(model, inputs, examples, tmp_path / "m.onnx", 1e-5) < 1e-5


def test_an_image_side_that_is_not_a_multiple_of_4_is_refused() -> None:
    with pytest.raises(Failure, match="multiples of 4, not 30x28"):
        ConvGenerator(6, [1, 30, 28])


class UpdateRecorder(pl.Callback):
    """Records for every batch whether the generator and the discriminator changed."""

    def __init__(self) -> None:
        self.updates: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = self.parts(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        after = self.parts(pl_module)
        self.updates.append(tuple(not torch.equal(a, b) for a, b in zip(self.before, after, strict=True)))  # type: ignore[arg-type]

    @staticmethod
    def parts(model: Any) -> list[Tensor]:
        return [
            torch.cat([p.detach().flatten().clone() for p in part.parameters()])
            for part in (model.generator, model.discriminator)
        ]


@pytest.mark.parametrize(
    ("options", "generator_updates"),
    [
        ({}, [True, True, True, True]),
        ({"loss": "lsgan"}, [True, True, True, True]),
        ({"loss": "wgan_gp", "critic_steps": 3}, [True, False, False, True]),
    ],
)
@pytest.mark.parametrize("kind", PARTS)
def test_the_generator_is_updated_once_per_critic_steps(
    kind: str, options: dict[str, Any], generator_updates: list[bool]
) -> None:
    recorder = UpdateRecorder()
    trainer = fit(gan(kind, **options), recorder)
    assert [generator for generator, _ in recorder.updates] == generator_updates
    assert all(discriminator for _, discriminator in recorder.updates)
    metrics = trainer.callback_metrics
    names = {"train_generator_loss", "train_discriminator_loss", "train_real_judgement", "train_drawn_judgement"}
    assert names | {"val_diversity", "val_frechet", "lr"} <= set(metrics)
    assert ("train_wasserstein" in metrics) == (options.get("loss") == "wgan_gp")
    if "train_wasserstein" in metrics:
        estimate = metrics["train_real_judgement"] - metrics["train_drawn_judgement"]
        torch.testing.assert_close(metrics["train_wasserstein"], estimate)


def test_the_same_run_twice_gives_the_same_networks() -> None:
    first, again = (gan("conv", loss="wgan_gp") for _ in range(2))
    for model in (first, again):
        torch.manual_seed(5)
        fit(model, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_target_of_real_images_is_one_minus_the_smoothing() -> None:
    model, logits = gan(label_smoothing=0.1), torch.tensor([0.3, -2.0])
    expected = F.binary_cross_entropy_with_logits(logits, torch.full((2,), 0.9))
    torch.testing.assert_close(model.judged(logits, True, 0.1), expected)
    torch.testing.assert_close(model.judged(logits, True), F.binary_cross_entropy_with_logits(logits, torch.ones(2)))


@pytest.mark.parametrize("loss", ["vanilla", "lsgan", "wgan_gp"])
def test_a_discriminator_learns_to_judge_real_images_higher_and_a_generator_to_raise_its_own(loss: str) -> None:
    """In one step from the same weights: the discriminator widens the gap, the generator raises what is drawn."""
    model = gan(loss=loss, penalty=0.0)
    model.optimizer_config = SGD(name="sgd", lr=0.01)
    real, latents = images(64), torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    scaled_real = real.float() / 127.5 - 1

    def judgements_of(generator: nn.Module, discriminator: nn.Module) -> tuple[float, float]:
        return float(discriminator(scaled_real).mean()), float(discriminator(generator(latents)).mean())

    before = copy.deepcopy(model).train()
    split = {"images": real, "labels": torch.zeros(64, dtype=torch.int64)}
    loader = ImageBatches(split, {"kind": "images"}, ImageLoader(batch_size=64), train=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=5,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    with torch.no_grad():
        real_before, drawn_before = judgements_of(before.generator, before.discriminator)
        real_after, drawn_after = judgements_of(before.generator, model.discriminator)
        assert real_after - drawn_after > real_before - drawn_before
        assert judgements_of(model.generator, model.discriminator)[1] > drawn_after


class LinearCritic(nn.Module):
    """A critic whose gradient has the same norm everywhere."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x.flatten(1)[:, :1]


@pytest.mark.parametrize("slope", [0.0, 1.0, 3.0])
def test_the_gradient_penalty_is_the_squared_distance_of_the_norm_from_1(slope: float) -> None:
    model = gan(loss="wgan_gp")
    model.discriminator = LinearCritic(slope)
    penalty = model.steepness(torch.rand(5, *SHAPE), torch.rand(5, *SHAPE))
    assert float(penalty) == pytest.approx((slope - 1) ** 2)


def validated(eval_batch_size: int, count: int = 16) -> dict[str, float]:
    """What a validation of an untrained GAN logs."""
    split = {"images": images(count), "labels": torch.zeros(count, dtype=torch.int64)}
    loader = ImageLoader(batch_size=4, eval_batch_size=eval_batch_size)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.validate(gan(), ImageBatches(split, {"kind": "images"}, loader, train=False), verbose=False)
    return dict(metrics)


@pytest.mark.parametrize("eval_batch_size", [8, 5, 3])  # the last batch has 8, 1 and 1 images
def test_drawn_images_are_compared_over_the_complete_split_whatever_the_batch_size(eval_batch_size: int) -> None:
    model = gan().eval()
    drawn = model.answer(model.draw_latents(16, seed=0)).detach()
    real = images().float() / 255
    features = (F.adaptive_avg_pool2d(pictures, 7).flatten(1) for pictures in (real, drawn))
    assert validated(eval_batch_size) == pytest.approx(
        {"val_diversity": diversity(real, drawn), "val_frechet": frechet_distance(*features)}, rel=1e-4
    )


def test_a_validation_of_a_single_image_is_refused() -> None:
    with pytest.raises(Failure, match="val_frechet: one validation image has no distribution"):
        validated(1, count=1)


def test_two_processes_draw_the_images_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each its share; the metric gathers them. The next validation begins with none."""
    compared: list[Tensor] = []

    def note(metric: DrawnAgainstReal) -> dict[str, float]:
        compared.append(torch.cat(metric.drawn_images))
        return {}

    def validate(rank: int, world: int) -> Tensor:
        model = gan().eval()
        monkeypatch.setattr(GAN, "global_rank", rank)
        monkeypatch.setattr(GAN, "trainer", SimpleNamespace(world_size=world))
        monkeypatch.setattr(model, "all_gather", lambda count: count.repeat(world))
        monkeypatch.setattr(model, "log_dict", lambda values: None)
        monkeypatch.setattr(model.drawn_against_real, "compute", lambda: note(model.drawn_against_real))
        for part in images(16)[rank::world].split(3):
            model.validation_step((part,), 0)
        model.on_validation_epoch_end()
        assert model.drawn_against_real.real_count == 0
        return compared[-1]

    alone = validate(0, 1)
    first, second = validate(0, 2), validate(1, 2)
    assert torch.equal(torch.stack([first, second], dim=1).flatten(0, 1), alone)


# --- fidelity and diversity -------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_gaussians_equals_the_formula() -> None:
    random = torch.Generator().manual_seed(0)
    points = torch.randn(4000, 3, generator=random).double()
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points, points + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-9)
    # covariances C and 4 C: trace(C + 4 C - 2 * 2 C) = trace(C)
    scaled = float(points.T.cov().trace())
    assert frechet_distance(points, 2 * points - points.mean(0)) == pytest.approx(scaled, rel=1e-6)


def test_a_missing_mode_lowers_recall_and_wrong_images_both() -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 2, generator=random), 20 + torch.randn(200, 2, generator=random)])
    one_mode = torch.randn(400, 2, generator=random)
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    far = 100 + torch.randn(400, 2, generator=random)
    assert precision_recall(real, far) == (0.0, 0.0)


def test_diversity_is_one_for_equal_variety_and_low_for_repeated_images() -> None:
    random = torch.Generator().manual_seed(0)
    real, other = torch.rand(2, 200, 1, 8, 8, generator=random)
    assert diversity(real, other) == pytest.approx(1, abs=0.1)
    assert diversity(real, real[:1].repeat(200, 1, 1, 1)) == 0
    few = real[:5].repeat(40, 1, 1, 1) + 0.01 * torch.rand(200, 1, 8, 8, generator=random)
    assert diversity(real, few) < generation.COLLAPSED


def test_a_collapse_is_reported_with_its_epoch_and_recovery() -> None:
    def rows(*values: float) -> list[dict[str, float]]:
        return [{"epoch": number, "val_diversity": value} for number, value in enumerate(values, 1)]

    assert generation.TASK.remark(rows(0.9, 0.8, 0.7)) is None
    assert generation.TASK.remark(rows(0.9, 0.1, 0.05)) == (
        "The generator collapsed in epoch 2: its images' diversity fell to 0.05 of the real ones'."
    )
    assert "collapsed in epoch 1, and recovered: " in str(generation.TASK.remark(rows(0.1, 0.8)))


# --- evaluation -------------------------------------------------------------------------------------------------------


def two_classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise that is brighter in the upper half (class 0) or the lower half (class 1)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 100, (count, *SHAPE), generator=random)
    pixels[labels == 0, :, :4] += 150
    pixels[labels == 1, :, 4:] += 150
    return pixels.to(torch.uint8), labels


def test_the_scoring_classifier_is_accurate_and_reproducible() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train_judge(*two_classes(64, 0), 2, steps=30, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    again = train_judge(*two_classes(64, 0), 2, steps=30, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    test_images, labels = two_classes(32, 1)
    features, predicted = judgements(first, test_images)
    assert features.shape == (32, 64)
    assert torch.equal(predicted, labels)


class ImageSampler(nn.Module):
    """A generator that returns stored images, uint8 [N, C, H, W]; the first latent number selects one."""

    latent = 6

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def draw_latents(self, count: int, seed: int) -> Tensor:
        return torch.rand(count, self.latent, generator=torch.Generator().manual_seed(seed))

    def answer(self, latents: Tensor) -> Tensor:
        return self.images[(latents[:, 0] * len(self.images)).long()].float() / 255


@pytest.fixture
def evaluate(tmp_path: Path) -> Any:
    """Evaluates a generator; its metrics."""
    config = compose(["experiment=mnist_gan", "output=out", f"data_folder={tmp_path}", "evaluation.judge_steps=30"])
    splits = {}
    for number, split in enumerate(packed.SPLITS):
        pixels, labels = two_classes(100, number)
        splits[split] = {"images": pixels.numpy(), "labels": labels.numpy()}
    meta = {"kind": "images", "classes": ["top", "bottom"]}
    meta = write_packed(packed.Packed(splits, meta), config.processed, config={}, source={})
    test = ImageBatches(packed.read_split(config.processed, "test"), meta, config.loader, train=False)
    (tmp_path / "evaluation").mkdir()
    return lambda model: generation.TASK.evaluate(model, test, config, meta, tmp_path / "evaluation").metrics


def test_metrics_separate_real_images_from_a_single_repeated_one(evaluate: Any, tmp_path: Path) -> None:
    diverse = evaluate(ImageSampler(two_classes(1000, 9)[0]))
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {"samples.png"}
    assert diverse["frechet_real"] > 0
    assert (diverse["classes_drawn"], diverse["collapsed"], diverse["judge_accuracy"]) == (2, 0, 1.0)
    assert diverse["diversity"] == pytest.approx(1, abs=0.2)
    collapsed = evaluate(ImageSampler(two_classes(1000, 9)[0][:1]))
    assert (collapsed["classes_drawn"], collapsed["collapsed"], collapsed["diversity"]) == (1, 1, 0)
    assert collapsed["frechet"] > 5 * diverse["frechet"]
    assert collapsed["recall"] < 0.1 < diverse["recall"]
