"""Residual networks for small images: the classic ResNet-18, and one that trains ten times as fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.config import PositiveInt


def resnet18(shape: Sequence[int], classes: int) -> nn.Module:
    """ResNet-18 (He et al., 2016) with the CIFAR stem: a 3x3 convolution of stride 1, no pooling before the blocks.

    Maps float [B, *shape], shape (C, H, W), to logits [B, classes]; 11.17 million parameters for three channels and ten
    classes.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    network = torchvision_resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(shape[0], 64, kernel_size=3, stride=1, padding=1, bias=False)
    network.maxpool = nn.Identity()
    # He initialisation with fan_out is torchvision's own; the stem that replaces theirs gets the same.
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def _normalisation(width: int) -> nn.BatchNorm2d:
    """Batch normalisation with its scale frozen at one, as the next convolution can scale, and a quick running mean."""
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class Convolution(nn.Conv2d):
    """A 3x3 convolution without bias that keeps the size, [B, in, H, W] -> [B, out, H, W], quick on small maps too.

    The library's bf16 convolutions on a CPU work along rows. Where these are short, first the filters' gradient runs at
    a third of the processor's speed or less (maps of 7x7), then all does (3x3): there it is matrix multiplication.
    """

    SMALL, TINY = 8, 4  # pixels a side up to which the filters' gradient, or all, is matrix multiplication

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        # The first inputs pass unchanged at the start (Zagoruyko and Komodakis, 2017); other outputs are random.
        nn.init.dirac_(self.weight[:inputs])

    def forward(self, x: Tensor) -> Tensor:
        cpu_bf16 = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if self.training and cpu_bf16 and max(x.shape[2:]) <= self.SMALL:
            quick = _TinyConvolution if max(x.shape[2:]) <= self.TINY else _SmallConvolution
            return quick.apply(x.bfloat16(), self.weight.bfloat16())
        return super().forward(x)


def _neighbourhoods(maps: Tensor) -> Tensor:
    """Each pixel's 3x3 neighbourhood as a row: [B, C, H, W] -> [B*H*W, 9*C]; a view on the padded maps, copied once."""
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


def _filters_gradient(grad: Tensor, neighbourhoods: Tensor) -> Tensor:
    """Of the output's gradient [B, out, H, W] and the inputs' neighbourhoods [B*H*W, 9*in]: [out, in, 3, 3]."""
    to_filters = grad.permute(0, 2, 3, 1).flatten(0, 2).T @ neighbourhoods
    return to_filters.view(len(to_filters), 3, 3, -1).permute(0, 3, 1, 2)


class _SmallConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        to_input, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
        )
        return to_input, _filters_gradient(grad, _neighbourhoods(x))


class _TinyConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        neighbourhoods = _neighbourhoods(x)
        ctx.save_for_backward(neighbourhoods, weight)
        out = neighbourhoods @ weight.permute(0, 2, 3, 1).flatten(1).T
        return out.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        neighbourhoods, weight = ctx.saved_tensors
        (grad,) = grads
        # The gradient of the input is the convolution of the output's with the filters turned round.
        turned = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)
        to_input = (_neighbourhoods(grad) @ turned).view(len(grad), *grad.shape[2:], -1).permute(0, 3, 1, 2)
        return to_input, _filters_gradient(grad, neighbourhoods)


class _Block(nn.Module):
    """Convolution and pooling, then a residual convolution: [B, in, H, W] -> [B, out, H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = Convolution(inputs, outputs)
        self.enter_norm = _normalisation(outputs)
        self.residual = Convolution(outputs, outputs)
        self.residual_norm = _normalisation(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.enter_norm(F.max_pool2d(self.enter(x), 2)))
        return F.gelu(x + self.residual_norm(self.residual(x)))


class FastResNet(nn.Module):
    """A residual network after the ideas of Keller Jordan's airbench (arXiv 2404.00498).

    A 2x2 convolution that whitens patches (fitted once on training images, then frozen), three blocks of two
    convolutions each with a shortcut over the second, pooling, a linear layer whose output is scaled down. An image of
    32x32 takes 0.33 GFLOP at width 64, 0.50 at 80; ResNet-18 takes 1.11. Maps float [B, *shape], shape (C, H, W) with
    H and W at least 9, to logits [B, classes].
    """

    WHITENING_EPSILON = 5e-4  # keeps directions of next to no variance from being blown up (airbench's value)
    OUTPUT_SCALE = 1 / 9  # airbench's: keeps early logits small under a high rate

    def __init__(self, shape: Sequence[int], classes: int, *, width: PositiveInt = 64) -> None:
        super().__init__()
        patch = shape[0] * 2 * 2
        self.whiten = nn.Conv2d(shape[0], 2 * patch, kernel_size=2, bias=True)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.blocks = nn.Sequential(_Block(2 * patch, width), _Block(width, 4 * width), _Block(4 * width, 8 * width))
        self.classify = nn.Linear(8 * width, classes, bias=False)

    @torch.no_grad()
    def fit_whitening(self, images: Tensor) -> None:
        """Sets the first convolution to the eigenvectors of the patches' covariance, each once with either sign.

        `images`: normalised float [N, C, H, W]; a few thousand suffice.
        """
        dimensions = self.whiten.weight[0].numel()
        second = torch.zeros(dimensions, dimensions, dtype=torch.float64)
        mean, count = torch.zeros(dimensions, dtype=torch.float64), 0
        for some in images.cpu().split(500):  # all patches at once would be the largest tensor of the whole training
            patches = F.unfold(some.float(), 2).transpose(1, 2).reshape(-1, dimensions).double()
            second, mean, count = second + patches.T @ patches, mean + patches.sum(0), count + len(patches)
        mean = mean / count
        values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
        filters = (
            (vectors / (values + self.WHITENING_EPSILON).sqrt()).T.flip(0).view_as(self.whiten.weight[: len(values)])
        )
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.whiten(x)))
        # Not amax, whose gradient is shared among equals: 0 / 0 where a compiled bf16 graph compares unrounded values.
        return self.classify(F.max_pool2d(x, x.shape[2:]).flatten(1)) * self.OUTPUT_SCALE
