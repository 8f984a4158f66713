"""Networks for small images and the image classifier around them: normalization, whitening, loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import SGD, Constant
from src.models.classifier import ImageClassifier
from src.models.cpu import Convolution
from src.models.layers import max_pool_2x2
from src.models.resnet import FastResNet, resnet18

CLASSES = 10
SHAPE = [3, 32, 32]
META = {"shape": SHAPE, "classes": list("0123456789"), "mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.4]}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def classifier(network: Any) -> ImageClassifier:
    return ImageClassifier(
        META, network=network, optimizer=SGD(name="sgd", lr=0.1), schedule=Constant(name="constant")
    ).eval()


def photos(count: int = 64) -> Tensor:
    """Images with correlated pixels and channels, as in photos: uint8 [N, 3, 32, 32]."""
    noise = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 5, stride=1, padding=2)
    return (smooth + 0.5 * smooth.mean(1, keepdim=True)).mul(160).to(torch.uint8)


def test_resnet18_has_the_parameters_and_the_stem_for_cifar() -> None:
    network = resnet18(SHAPE, CLASSES).eval()
    assert parameters(network) == 11_173_962
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, CLASSES)
    stem = network.get_submodule("conv1")
    assert stem(torch.randn(1, 3, 32, 32)).shape == (1, 64, 32, 32)


def test_resnet18_accepts_other_channels_and_classes() -> None:
    assert resnet18([1, 28, 28], 7).eval()(torch.randn(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(
    ("side", "stem", "first", "blocks"),
    [
        (63, "auto", 63, 63),
        (64, "auto", 32, 16),
        (224, "auto", 112, 56),
        (224, "small", 224, 224),
        (32, "imagenet", 16, 8),
    ],
)
def test_the_stem_of_resnet18_fits_the_size_of_the_images(side: int, stem: Any, first: int, blocks: int) -> None:
    """By the sizes of the maps after the first convolution, and in the first block."""
    with torch.device("meta"):
        network = resnet18([1, side, side], CLASSES, stem=stem)
        x = torch.zeros(2, 1, side, side)
        conv = network.get_submodule("conv1")(x)
        assert conv.shape[-1] == first
        assert network.get_submodule("maxpool")(conv).shape[-1] == blocks
        assert network(x).shape == (2, CLASSES)


def test_with_imagenets_stem_resnet18_is_torchvisions() -> None:
    from torchvision.models import resnet18 as torchvision_resnet18

    network, original = resnet18([3, 224, 224], 1000).eval(), torchvision_resnet18().eval()
    original.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images), original(images))


def test_whitening_is_fitted_to_fewer_images_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many numbers as 5000 images of 32x32 have: all at 224x224 would take 3 GB."""
    seen: list[int] = []
    monkeypatch.setattr(FastResNet, "fit_whitening", lambda self, images: seen.append(len(images)))
    for side in (32, 64):
        model = ImageClassifier(
            META | {"shape": [3, side, side]},
            network=partial(FastResNet, width=1),  # type: ignore[arg-type]
            optimizer=SGD(name="sgd", lr=0.1),
            schedule=Constant(name="constant"),
        )
        model.prepare({"images": torch.zeros(1, 3, side, side, dtype=torch.uint8).expand(6000, -1, -1, -1)})
    assert seen == [5000, 1250]


def test_fast_resnet_has_the_parameters_of_its_parts() -> None:
    def block(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 9 * outputs * outputs + 2 * 2 * outputs  # two convolutions, two norms

    whitening = 24 * (3 * 2 * 2) + 24  # twelve patch directions, each with either sign; one bias each
    total = whitening + block(24, 64) + block(64, 256) + block(256, 512) + 512 * CLASSES
    assert parameters(FastResNet(SHAPE, CLASSES, width=64)) == total == 4_335_672


def test_fast_resnet_accepts_images_from_nine_pixels_on() -> None:
    network = FastResNet(SHAPE, CLASSES, width=8).eval()
    for size in (9, 28, 32):
        assert network(torch.randn(2, 3, size, size)).shape == (2, CLASSES)


def test_fast_resnet_freezes_whitening_filters_and_norm_scales() -> None:
    network = FastResNet(SHAPE, CLASSES, width=8)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    norms = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 6
    assert frozen == norms | {"whiten.weight"}
    assert all(bool((network.get_parameter(name) == 1).all()) for name in norms)


def test_a_convolution_starts_as_the_identity() -> None:
    block = FastResNet(SHAPE, CLASSES, width=8).blocks[1]
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(block.enter(x)[:, :8], x)  # type: ignore[operator]


def test_fitted_whitening_decorrelates_patches_in_both_signs() -> None:
    network = FastResNet(SHAPE, CLASSES, width=8)
    images = photos().float() / 64 - 1
    network.fit_whitening(images)
    filters = network.whiten.weight
    assert torch.equal(filters[12:], -filters[:12])

    patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12).double()
    before = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0)
    whitened = F.conv2d(images, filters[:12]).transpose(0, 1).flatten(1)
    covariance = torch.cov(whitened.double())
    # A direction of variance v has the variance v / (v + epsilon) afterwards: near one, unless v is tiny.
    torch.testing.assert_close(covariance, (before / (before + network.WHITENING_EPSILON)).diag(), atol=1e-3, rtol=0)
    assert covariance[0, 0] > 0.99
    assert before[0] / before[-1] > 20, "the images were white before: the test would prove nothing"


def test_images_are_normalized_by_mean_and_deviation() -> None:
    model = classifier(lambda shape, classes: nn.Flatten())
    mean = torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    above = torch.tensor([51 + 25.5, 102 + 51, 153 + 102]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(model(mean), torch.zeros(2, 3072), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(above), torch.ones(2, 3072))


def test_a_classifier_fits_the_whitening_of_networks_that_have_one() -> None:
    model = classifier(lambda shape, classes: FastResNet(shape, classes, width=8))
    model.prepare({"images": photos()})
    reference = FastResNet(SHAPE, CLASSES, width=8)
    reference.fit_whitening((photos() - model.mean) / model.std)
    assert torch.equal(model.network.get_parameter("whiten.weight"), reference.whiten.weight)

    plain = classifier(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)))
    before = plain.network.get_parameter("1.weight").clone()
    plain.prepare({"images": photos()})
    assert torch.equal(plain.network.get_parameter("1.weight"), before)


def test_answers_are_probabilities() -> None:
    answer = classifier(lambda shape, classes: FastResNet(shape, classes, width=8)).answer(photos(4))
    assert answer.shape == (4, CLASSES)
    torch.testing.assert_close(answer.sum(1), torch.ones(4))
    assert answer.min() >= 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_cross_entropy_and_the_sums_count_correct_answers(smoothing: float) -> None:
    model = classifier(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)))
    images, labels = photos(8), torch.arange(8)
    loss = model.loss((images, labels), "val", smoothing)
    logs = model(images).log_softmax(1)
    expected = -((1 - smoothing) * logs[labels, labels] + smoothing * logs.mean(1)).mean()
    torch.testing.assert_close(loss, expected)
    correct = int((model(images).argmax(1) == labels).sum())
    assert model.val_sums.flatten().tolist() == pytest.approx([8 * loss.item(), 8, correct, 8])


def test_training_smooths_the_labels_and_validation_does_not() -> None:
    model = classifier(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)))
    model.label_smoothing = 0.2
    batch = (photos(8), torch.arange(8))
    smoothed, plain = (float(model.loss(batch, "train", smoothing)) for smoothing in (0.2, 0.0))
    assert smoothed != plain
    assert float(model.step_loss(batch)) == smoothed
    model.validation_step(batch, 0)
    assert float(model.val_sums[0, 0]) == pytest.approx(8 * plain)


@pytest.mark.parametrize(("size", "inputs", "outputs"), [(2, 16, 48), (3, 32, 32), (7, 16, 48), (8, 5, 7)])
def test_small_maps_have_the_gradients_of_a_plain_convolution(
    size: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Convolution, "SMALL", 8)  # as on a processor with tiles
    torch.manual_seed(0)
    convolution = Convolution(inputs, outputs)
    nn.init.normal_(convolution.weight)
    reference = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    reference.load_state_dict(convolution.state_dict())
    maps = torch.randn(6, inputs, size, size)
    results = []
    for module in (convolution.train(), reference):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        x = maps.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.float().square().sum().backward()
        assert x.grad is not None and module.weight.grad is not None
        results.append((y.detach(), x.grad, module.weight.grad))
    assert results[0][2].dtype == torch.float32
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(60, 3, 7, 10), (25, 16, 2, 2), (1, 8, 31, 31), (26, 5, 9, 9)])
def test_pooling_equals_torch_and_saves_two_bytes_per_maximum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    maps = torch.randn(shape).mul(4).round().to(dtype).contiguous(memory_format=torch.channels_last)  # with many ties
    gradient = torch.randn(shape[0], shape[1], shape[2] // 2, shape[3] // 2).to(dtype)
    results, saved_bytes = [], []
    for pool in (max_pool_2x2, lambda x: F.max_pool2d(x, 2)):
        x, saved = maps.clone().requires_grad_(), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):  # type: ignore[misc]
            y = pool(x)
        y.backward(gradient)
        assert x.grad is not None
        results.append((y.detach(), x.grad))
        saved_bytes.append(sum(t.nbytes for t in saved))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert saved_bytes[0] == 2 * gradient.numel() < saved_bytes[1] / 4


def test_pooling_falls_back_to_torch_for_other_layouts_and_sizes() -> None:
    for x in (
        torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 8, 8).requires_grad_(),
        torch.randn(1, 2, 200, 200).contiguous(memory_format=torch.channels_last).requires_grad_(),
    ):
        pooled, expected = max_pool_2x2(x), F.max_pool2d(x, 2)
        assert torch.equal(pooled, expected)
        assert type(pooled.grad_fn) is type(expected.grad_fn)
