"""Ordinary code for CycleGAN, in the order of the authors' loop: PyTorch's own layers, one network call each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import StepClock
from src.configuration.schema import Config
from src.models.adversarial import initialise

WORKERS = 2  # processes that crop pictures


class Unaligned(Dataset[tuple[Tensor, Tensor]]):
    """An image of A and a random one of B, each cropped and mirrored as a PIL image; float [3, S, S] in -1..1."""

    def __init__(self, split: dict[str, Tensor], size: int) -> None:
        from torchvision import transforms

        self.domains = [split[name].numpy().transpose(0, 2, 3, 1) for name in ("a", "b")]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return max(map(len, self.domains))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        a, b = self.domains
        chosen = a[index % len(a)], b[random.randrange(len(b))]
        first, second = (self.transform(Image.fromarray(np.ascontiguousarray(image))) for image in chosen)
        return first, second


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        other = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.layers = nn.Sequential(*half, nn.ReLU(inplace=True), *other)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def resnet_generator(width: int, blocks: int) -> nn.Sequential:
    """The residual generator."""
    layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7)]
    layers += [nn.InstanceNorm2d(width), nn.ReLU(inplace=True)]
    for inputs in (width, 2 * width):
        layers += [nn.Conv2d(inputs, 2 * inputs, 3, stride=2, padding=1)]
        layers += [nn.InstanceNorm2d(2 * inputs), nn.ReLU(inplace=True)]
    layers += [Block(4 * width) for _ in range(blocks)]
    for inputs in (4 * width, 2 * width):
        layers += [nn.ConvTranspose2d(inputs, inputs // 2, 3, stride=2, padding=1, output_padding=1)]
        layers += [nn.InstanceNorm2d(inputs // 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


def patch_discriminator(width: int) -> nn.Sequential:
    """The 70x70 PatchGAN."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    for inputs, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(inputs, 2 * inputs, 4, stride=stride, padding=1)]
        layers += [nn.InstanceNorm2d(2 * inputs), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))


def initialise_convolution(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions; the norms have no parameters."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        initialise(module)


class Pool:
    """Up to 50 earlier images, one of which is shown half of the time."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        """Images to show for the new ones."""
        shown = []
        for image in images.detach().split(1):
            if len(self.images) < 50:
                self.images.append(image)
            elif random.random() < 0.5:
                place = random.randrange(50)
                image, self.images[place] = self.images[place], image
            shown.append(image)
        return torch.cat(shown)


def lsgan(logits: Tensor, real: bool) -> Tensor:
    """The least squares loss."""
    return F.mse_loss(logits, torch.full_like(logits, float(real)))


def cyclegan(
    config: Config, meta: Mapping[str, Any], split: dict[str, Tensor], device: torch.device, clock: StepClock
) -> None:
    """Generators, then discriminators, with cycle and identity loss."""
    model = config.plain()["model"]
    to_b, to_a = (
        resnet_generator(model["width"], model["blocks"]).apply(initialise_convolution).to(device) for _ in range(2)
    )
    judge_b, judge_a = (
        patch_discriminator(model["discriminator_width"]).apply(initialise_convolution).to(device) for _ in "ba"
    )
    judges = nn.ModuleList([judge_a, judge_b])
    generator_optimizer = torch.optim.Adam(
        itertools.chain(to_b.parameters(), to_a.parameters()), lr=2e-4, betas=(0.5, 0.999)
    )
    discriminator_optimizer = torch.optim.Adam(judges.parameters(), lr=2e-4, betas=(0.5, 0.999))
    pool_a, pool_b = Pool(), Pool()
    loader = DataLoader(
        Unaligned(split, meta["shape"][-1]),
        batch_size=config.loader.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
    )
    for batch in loader:
        a, b = (side.to(device) for side in batch)
        fake_b = to_b(a)
        back_a = to_a(fake_b)
        fake_a = to_a(b)
        back_b = to_b(fake_a)

        judges.requires_grad_(False)
        generator_optimizer.zero_grad()
        loss = lsgan(judge_b(fake_b), True) + lsgan(judge_a(fake_a), True)
        loss = loss + 10 * F.l1_loss(back_a, a) + 10 * F.l1_loss(back_b, b)
        if model["identity"]:
            loss = loss + 10 * model["identity"] * (F.l1_loss(to_b(b), b) + F.l1_loss(to_a(a), a))
        loss.backward()
        generator_optimizer.step()

        judges.requires_grad_(True)
        discriminator_optimizer.zero_grad()
        for judge, real, fake in ((judge_b, b, pool_b.query(fake_b)), (judge_a, a, pool_a.query(fake_a))):
            ((lsgan(judge(real), True) + lsgan(judge(fake), False)) / 2).backward()
        discriminator_optimizer.step()
        clock.tick()
        if clock.ticks == clock.steps:
            return
