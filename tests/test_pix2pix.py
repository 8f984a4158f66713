"""pix2pix: the architecture, losses and rates of the authors; which network each half of a step trains."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import Failure
from src.configuration.composing import compose
from src.configuration.schema import Adam, Linear
from src.data.kinds.pairs import PairBatches, PairLoader
from src.models.adversarial import scaled
from src.models.optimization import rate_factor
from src.models.pix2pix import PatchGAN, Pix2Pix, UNet

SIZE = 32


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def pix2pix(lr: float = 2e-4, gan: Literal["vanilla", "lsgan"] = "vanilla", l1: float = 100.0) -> Pix2Pix:
    torch.manual_seed(0)
    return Pix2Pix(
        {"shape": [3, SIZE, SIZE]},
        optimizer=Adam(name="adam", lr=lr, beta1=0.5),
        schedule=Linear(name="linear", hold=0.5),
        gan=gan,
        l1=l1,
        width=4,
    )


def pairs(count: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    source, target = torch.randint(256, (2, count, 3, SIZE, SIZE), dtype=torch.uint8, generator=random)
    return source, target


def train(model: Pix2Pix, *callbacks: pl.Callback, epochs: int = 1, target: Tensor | None = None) -> pl.Trainer:
    """Trains on four pairs, in two batches per epoch."""
    source, noise = pairs()
    split = {"input": source, "target": noise if target is None else target}
    loader = PairLoader(batch_size=2, eval_batch_size=2)
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
    trainer.fit(
        model,
        PairBatches(split, {"kind": "pairs"}, loader, train=True),
        PairBatches(split, {"kind": "pairs"}, loader, train=False),
    )
    return trainer


@torch.no_grad()
def l1(model: Pix2Pix, source: Tensor, target: Tensor) -> float:
    return float(F.l1_loss(model(source), target / 255))


# --- the architecture -------------------------------------------------------------------------------------------------


def test_the_networks_have_as_many_parameters_as_the_authors() -> None:
    # junyanz/pytorch-CycleGAN-and-pix2pix prints 54.414 M for unet_256 and 2.769 M for the basic discriminator.
    with torch.device("meta"):
        assert parameters(UNet(256, width=64, norm="batch")) == 54_413_955
        assert parameters(PatchGAN(width=64, norm="batch")) == 2_768_705


def layers_with(layers: nn.ModuleList, *kinds: type[nn.Module]) -> list[bool]:
    """Whether each layer holds a module of one of these kinds."""
    return [any(isinstance(part, kinds) for part in layer.children()) for layer in layers]


def dropouts(network: UNet) -> list[int]:
    """The indices of the decoder's layers with dropout, from the innermost."""
    return [number for number, has in enumerate(layers_with(network.up, nn.Dropout)) if has]


@pytest.mark.parametrize(
    ("size", "indices"), [(32, []), (64, [1]), (128, [1, 2]), (256, [1, 2, 3]), (512, [1, 2, 3, 4])]
)
def test_dropout_is_in_the_widest_decoder_layers_except_the_innermost(size: int, indices: list[int]) -> None:
    with torch.device("meta"):
        network = UNet(size, width=3)
    assert dropouts(network) == indices
    assert len(indices) == int(math.log2(size)) - 5


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_norms_and_biases_are_in_the_layers_of_the_paper(
    norm: str,
) -> None:
    network = UNet(64, width=4, norm=norm)
    norms = (nn.BatchNorm2d, nn.InstanceNorm2d)
    assert layers_with(network.down, *norms) == [False, True, True, True, True, False]
    assert layers_with(network.up, *norms) == [True, True, True, True, True, False]
    biased = [part.bias is not None for part in network.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    assert biased == [norm == "instance"] * 11 + [True]


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_generator_keeps_the_size_and_outputs_minus_one_to_one(size: int) -> None:
    network = UNet(size, width=2, norm="instance").eval()
    with torch.no_grad():
        for layer in network.up:
            layer.get_parameter("1.weight").mul_(20)  # saturates the tanh
        pictures = network(torch.rand(2, 3, size, size) * 2 - 1)
    assert pictures.shape == (2, 3, size, size)
    assert -1 <= pictures.min() < -0.9 < 0.9 < pictures.max() <= 1


@pytest.mark.parametrize("size", [0, 16, 96, 100, 255])
def test_a_size_that_is_no_power_of_two_from_32_is_refused(size: int) -> None:
    with pytest.raises(Failure, match=rf"not {size}: set data\.size"):
        UNet(size, width=2)


def test_dropout_is_active_in_training_only() -> None:
    network, x = UNet(64, width=4, norm="instance"), torch.randn(1, 3, 64, 64)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(("size", "patches"), [(32, 2), (64, 6), (128, 14), (256, 30)])
def test_the_discriminator_has_a_logit_per_patch(size: int, patches: int) -> None:
    x = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        assert PatchGAN(width=2)(x, x).shape == (2, 1, patches, patches)


def test_a_logit_depends_on_a_patch_of_70_pixels() -> None:
    network = PatchGAN(width=4, norm="batch").double().eval()
    source, picture = torch.rand(2, 1, 3, 256, 256, dtype=torch.float64).requires_grad_()
    source.retain_grad()
    picture.retain_grad()
    network(source, picture)[0, 0, 15, 15].backward()
    for gradient in (source.grad, picture.grad):
        assert gradient is not None
        field = gradient[0].ne(0).any(0)
        rows, columns = field.any(1).nonzero(), field.any(0).nonzero()
        assert int(rows.max() - rows.min()) + 1 == int(columns.max() - columns.min()) + 1 == 70


def test_weights_are_initialized_as_in_the_paper() -> None:
    torch.manual_seed(0)
    model = Pix2Pix(
        {"shape": [3, 64, 64]}, optimizer=Adam(name="adam", lr=1.0), schedule=Linear(name="linear"), width=16
    )
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d) and part.weight.numel() > 10_000:
            assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
            assert part.bias is None or not part.bias.any()
        if isinstance(part, nn.InstanceNorm2d):
            assert float(part.weight.detach().mean()) == pytest.approx(1.0, abs=0.02)


# --- losses and rates -------------------------------------------------------------------------------------------------


def test_the_vanilla_loss_is_the_binary_cross_entropy() -> None:
    model, logits = pix2pix(gan="vanilla"), torch.tensor([[-2.0, 0.5, 3.0]])
    assert float(model.judged(torch.zeros(1, 1, 3, 3), True)) == pytest.approx(math.log(2))
    assert float(model.judged(torch.zeros(1, 1, 3, 3), False)) == pytest.approx(math.log(2))
    torch.testing.assert_close(model.judged(logits, True), -logits.sigmoid().log().mean())
    torch.testing.assert_close(model.judged(logits, False), -(1 - logits.sigmoid()).log().mean())


def test_the_lsgan_loss_is_the_squared_distance_to_one_or_zero() -> None:
    model, logits = pix2pix(gan="lsgan"), torch.tensor([[-2.0, 0.5, 3.0]])
    torch.testing.assert_close(model.judged(logits, True), (logits - 1).square().mean())
    torch.testing.assert_close(model.judged(logits, False), logits.square().mean())


def test_inputs_are_scaled_to_minus_one_to_one_and_answers_to_zero_to_one() -> None:
    assert scaled(torch.tensor([0, 255], dtype=torch.uint8), torch.float32).tolist() == [-1, 1]
    model, source = pix2pix().eval(), pairs()[0]
    answer = model.answer(source)
    torch.testing.assert_close(answer, (model.generator(source / 127.5 - 1) + 1) / 2)
    assert 0 <= answer.min() < answer.max() <= 1


def with_zero_logits(model: Pix2Pix) -> Pix2Pix:
    """Sets the last layer of the discriminator to zero, and thereby its logits."""
    last = model.discriminator.layers[-1]
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    return model


def test_the_losses_of_generator_and_discriminator() -> None:
    model = with_zero_logits(pix2pix(lr=1e-12, l1=10.0))  # this rate changes no weight
    source, target = pairs()
    distance = l1(model, source, target)  # no dropout at 32 pixels: the same in training
    metrics = {name: float(value) for name, value in train(model).callback_metrics.items()}
    assert metrics["train_discriminator_loss"] == pytest.approx(math.log(2), rel=1e-4)  # (ln 2 + ln 2) / 2
    assert metrics["train_l1"] == pytest.approx(distance, rel=1e-4)
    assert metrics["val_l1"] == pytest.approx(distance, rel=1e-4)
    assert metrics["train_generator_loss"] == pytest.approx(math.log(2) + 10.0 * 2 * distance, rel=1e-4)


def test_the_rate_is_constant_for_half_a_run_then_falls_linearly_to_zero() -> None:
    schedule = compose(["experiment=facades_pix2pix", "output=unused"]).model.schedule  # type: ignore[attr-defined]
    assert [rate_factor(schedule, p) for p in (0.0, 0.25, 0.5)] == [1, 1, 1]
    assert rate_factor(schedule, 0.75) == pytest.approx(0.5)
    assert rate_factor(schedule, 1.0) == 0


# --- a step -----------------------------------------------------------------------------------------------------------


class ChangedNetworks(pl.Callback):
    """Records for each optimizer step the networks whose weights it changed."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before: dict[str, Tensor] = {}

        def weights() -> dict[str, Tensor]:
            parts = ("generator", "discriminator")
            return {p: nn.utils.parameters_to_vector(pl_module.get_submodule(p).parameters()).detach() for p in parts}

        def after(*_: Any) -> None:
            self.changed.append({name for name, now in weights().items() if not torch.equal(now, before[name])})

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: before.update(weights()))
            optimizer.register_step_post_hook(after)


@pytest.mark.parametrize("gan", ["vanilla", "lsgan"])
def test_each_half_of_a_step_trains_its_own_network_only(gan: Literal["vanilla", "lsgan"]) -> None:
    callback = ChangedNetworks()
    train(pix2pix(gan=gan), callback)
    assert callback.changed == [{"discriminator"}, {"generator"}] * 2


class Norms(pl.Callback):
    """The norm of the gradients at each optimizer step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
            self.norms.append(float(torch.stack(gradients).norm()))

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(note)


def test_the_discriminator_learns_to_tell_real_pictures_from_drawn_ones() -> None:
    model = pix2pix(lr=2e-3)
    source, target = (scaled(side, torch.float32) for side in pairs())
    train(model, epochs=10)
    with torch.no_grad():
        real, drawn = (model.discriminator(source, side).mean() for side in (target, model.generator(source)))
    assert real > drawn + 1


def test_gradients_are_those_of_one_step() -> None:
    """With weights that hardly move they stay as large as at the first step."""
    noted = Norms()
    train(pix2pix(lr=1e-12), noted, epochs=2)
    for network in (noted.norms[0::2], noted.norms[1::2]):
        assert len(network) == 4
        assert max(network) < 1.5 * min(network)


def test_a_gradient_clip_limits_the_gradients_of_both_networks() -> None:
    free, clipped = Norms(), Norms()
    train(pix2pix(), free)
    assert min(free.norms) > 1e-3
    model = pix2pix()
    model.gradient_clip = 1e-3
    train(model, clipped)
    assert clipped.norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_training_reduces_the_distance_to_the_target() -> None:
    model = pix2pix(lr=5e-3)
    source, _ = pairs()
    target = source // 4  # the same picture, darker
    before = l1(model, source, target)
    train(model, epochs=15, target=target)
    assert l1(model, source, target) < 0.5 * before
