"""Residual networks: ResNet-18, and for small images a smaller one that trains ten times as fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.configuration.schema import Width
from src.models.cpu import Convolution
from src.models.layers import max_pool_2x2

LARGE = 64  # pixels of the shorter side from which images get ImageNet's stem

Stem = Literal["auto", "small", "imagenet"]


def resnet18(shape: Sequence[int], classes: int, *, stem: Stem = "auto") -> nn.Module:
    """ResNet-18 (He et al., 2016) with a stem for the size of the images.

    Maps float [B, *shape], shape (C, H, W), to logits [B, classes]; 11.17 million parameters for three channels and ten
    classes.

    Args:
        shape: of an image.
        classes: logits of an image.
        stem: `small`, CIFAR's, keeps the size: a 3x3 convolution of stride 1, no pooling; `imagenet` is the paper's: a
            7x7 convolution and a pooling, each of stride 2, with a sixteenth of the positions in all that follows;
            `auto`: small if a side has fewer than 64 pixels.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    network = torchvision_resnet18(num_classes=classes)
    if stem == "small" or (stem == "auto" and min(shape[1:]) < LARGE):
        network.conv1 = nn.Conv2d(shape[0], 64, kernel_size=3, padding=1)
        network.maxpool = nn.Identity()
    elif shape[0] != 3:
        network.conv1 = nn.Conv2d(shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1):
            convolution = Convolution(module.in_channels, module.out_channels)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
            network.set_submodule(name, convolution)
    return network


def _identity_convolution(inputs: int, outputs: int) -> Convolution:
    """A convolution whose first outputs are initially its inputs; the others are random.

    Zagoruyko and Komodakis, 2017.
    """
    convolution = Convolution(inputs, outputs)
    nn.init.dirac_(convolution.weight[:inputs])
    return convolution


def _batch_norm(width: int) -> nn.BatchNorm2d:
    """Batch normalisation with a fast running mean, and the scale frozen at one: the next convolution can scale."""
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class _Block(nn.Module):
    """Convolution and pooling, then a residual convolution: [B, in, H, W] -> [B, out, H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = _identity_convolution(inputs, outputs)
        self.enter_norm = _batch_norm(outputs)
        self.residual = _identity_convolution(outputs, outputs)
        self.residual_norm = _batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.enter_norm(max_pool_2x2(self.enter(x))))
        return F.gelu(x + self.residual_norm(self.residual(x)))


class FastResNet(nn.Module):
    """A residual network after Keller Jordan's airbench (arXiv 2404.00498).

    A 2x2 convolution that whitens patches (fitted once on training images, then frozen), three blocks of two
    convolutions each with a shortcut over the second, pooling, a linear layer whose output is scaled down. An image of
    32x32 takes 0.33 GFLOP at width 64, 0.50 at 80; ResNet-18 takes 1.11. Maps float [B, *shape], shape (C, H, W) with
    H and W at least 9, to logits [B, classes].
    """

    WHITENING_EPSILON = 5e-4  # bounds the gain of directions with little variance (airbench's value)
    OUTPUT_SCALE = 1 / 9  # keeps early logits small at a high learning rate (airbench's value)

    def __init__(self, shape: Sequence[int], classes: int, *, width: Width = 64) -> None:
        super().__init__()
        patch = shape[0] * 2 * 2
        self.whiten = nn.Conv2d(shape[0], 2 * patch, kernel_size=2, bias=True)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.blocks = nn.Sequential(_Block(2 * patch, width), _Block(width, 4 * width), _Block(4 * width, 8 * width))
        self.classify = nn.Linear(8 * width, classes, bias=False)

    @torch.no_grad()
    def fit_whitening(self, images: Tensor) -> None:
        """Sets the first convolution to the eigenvectors of the patches' covariance, each with either sign.

        `images`: normalised float [N, C, H, W]; a few thousand are enough.
        """
        dimensions = self.whiten.weight[0].numel()
        second = torch.zeros(dimensions, dimensions, dtype=torch.float64)
        mean, count = torch.zeros(dimensions, dtype=torch.float64), 0
        for part in images.cpu().split(500):  # all patches at once would be the largest tensor of the training
            patches = F.unfold(part.float(), 2).transpose(1, 2).reshape(-1, dimensions).double()
            second, mean, count = second + patches.T @ patches, mean + patches.sum(0), count + len(patches)
        mean = mean / count
        values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
        filters = (
            (vectors / (values + self.WHITENING_EPSILON).sqrt()).T.flip(0).view_as(self.whiten.weight[: len(values)])
        )
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.whiten(x)))
        # Not amax, which shares its gradient among equal maxima: 0 / 0 where a compiled bf16 graph compares unrounded
        # values.
        return self.classify(F.max_pool2d(x, x.shape[2:]).flatten(1)) * self.OUTPUT_SCALE
