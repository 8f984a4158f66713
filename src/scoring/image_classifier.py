"""A classifier that judges drawn images: by what it takes them for, and by what its last hidden layer sees in them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from src.configuration.schema import Linear
from src.models.convnet import ConvNet
from src.models.optimization import rate_factor

BATCH = 128
RATE = 2e-3


def train_judge(images: Tensor, labels: Tensor, classes: int, *, steps: int, seed: int) -> ConvNet:
    """Trains mnist_cnn's network on real images, uint8 [N, C, H, W], and their labels, int64 [N].

    It takes pixels in 0..1; `features` gives 64 numbers for each image. The same arguments give the same network on one
    machine, whatever the global random state.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNet(images.shape[1:], classes, widths=[32, 64], hidden=[64])
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = Linear(name="linear", warmup=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor(schedule, (step + 0.5) / steps)
        indices = torch.randint(len(images), (BATCH,), generator=random)
        loss = F.cross_entropy(model(images[indices].float() / 255), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def judgements(judge: ConvNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of images, uint8 [N, C, H, W]: features fp32 [N, D] and the classes they are taken for, int64 [N]."""
    features = torch.cat([judge.features(part.float() / 255) for part in images.split(500)])
    return features, judge.classify(features).argmax(1)
