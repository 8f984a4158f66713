"""Residual networks for small images: the classic ResNet-18, and one that trains ten times as fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.config import PositiveInt


def resnet18(channels: int, classes: int) -> nn.Module:
    """ResNet-18 (He et al., 2016) with the CIFAR stem: a 3x3 convolution of stride 1, no pooling before the blocks.

    Maps float [B, C, H, W] to logits [B, classes]; 11.17 million parameters for three channels and ten classes.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    network = torchvision_resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    network.maxpool = nn.Identity()
    # He initialisation with fan_out is torchvision's own; the stem that replaces theirs gets the same.
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def _normalisation(width: int) -> nn.BatchNorm2d:
    """Batch normalisation with its scale frozen at one, as the next convolution can scale, and a quick running mean."""
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class _Block(nn.Module):
    """Convolution and pooling, then a residual convolution: [B, in, H, W] -> [B, out, H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.enter_norm = _normalisation(outputs)
        self.residual = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.residual_norm = _normalisation(outputs)
        for convolution in (self.enter, self.residual):
            # The first inputs pass unchanged at the start (Zagoruyko and Komodakis, 2017); other outputs are random.
            nn.init.dirac_(convolution.weight[: convolution.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.enter_norm(F.max_pool2d(self.enter(x), 2)))
        return x + F.gelu(self.residual_norm(self.residual(x)))


class FastResNet(nn.Module):
    """A residual network after the ideas of Keller Jordan's airbench (arXiv 2404.00498).

    A 2x2 convolution that whitens patches (fitted once on training images, then frozen), three blocks of two
    convolutions each with a shortcut over the second, pooling, a linear layer whose output is scaled down. About a
    tenth of ResNet-18's work for each image. Maps float [B, C, H, W], H and W at least 9, to logits [B, classes].
    """

    WHITENING_EPSILON = 5e-4  # keeps directions of next to no variance from being blown up (airbench's value)
    OUTPUT_SCALE = 1 / 9  # airbench's: keeps early logits small under a high rate

    def __init__(self, channels: int, classes: int, *, width: PositiveInt = 64) -> None:
        super().__init__()
        patch = channels * 2 * 2
        self.whiten = nn.Conv2d(channels, 2 * patch, kernel_size=2, bias=True)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.blocks = nn.Sequential(_Block(2 * patch, width), _Block(width, 4 * width), _Block(4 * width, 4 * width))
        self.classify = nn.Linear(4 * width, classes, bias=False)

    @torch.no_grad()
    def fit_whitening(self, images: Tensor) -> None:
        """Sets the first convolution to the eigenvectors of the patches' covariance, each once with either sign.

        `images`: normalised float [N, C, H, W]; a few thousand suffice.
        """
        patches = F.unfold(images.float().cpu(), 2).transpose(1, 2).reshape(-1, self.whiten.weight[0].numel())
        values, vectors = torch.linalg.eigh(torch.cov(patches.double().T))
        filters = (
            (vectors / (values + self.WHITENING_EPSILON).sqrt()).T.flip(0).view_as(self.whiten.weight[: len(values)])
        )
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.whiten(x)))
        return self.classify(x.amax(dim=(2, 3))) * self.OUTPUT_SCALE
