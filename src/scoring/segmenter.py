"""A small U-Net that reads labels off photos, to judge generated pictures: a small FCN score (Isola et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Segmenter(nn.Module):
    """float [B, 3, S, S] in 0..1, S divisible by 8 -> logits [B, classes, S, S] (Ronneberger et al., 2015)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_double(a + b, b) for a, b in zip(widths[::-1], widths[-2::-1], strict=False))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for number, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2) if number else x)
            skips.append(x)
        skips.pop()
        for layer in self.up:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skips.pop()], dim=1))
        return self.classify(x)


def train_segmenter(
    photos: Tensor,
    labels: Tensor,
    classes: int,
    *,
    epochs: int,
    seed: int,
    autocast: torch.dtype | None,
    width: int = 16,
    batch_size: int = 8,
) -> Segmenter:
    """Trains on real photos, uint8 [N, 3, S, S], and their label maps, int64 [N, S, S].

    Mirrored at random, AdamW, one cycle. The same arguments give the same network on one machine.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter(classes, width).to(photos.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * -(-len(photos) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(photos), generator=random).split(batch_size):
            x, y = photos[chosen].float() / 255, labels[chosen]
            if torch.rand((), generator=random) < 0.5:
                x, y = x.flip(-1), y.flip(-1)
            with torch.autocast(photos.device.type, autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """Per-pixel accuracy, mean class accuracy and mean class IOU from confusion[true, predicted], int64 [C, C].

    Classes that occur neither in truth nor in prediction are left out of the means.
    """
    confusion = confusion.double()
    hit, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    union = true + predicted - hit
    return {
        "pixel_accuracy": float(hit.sum() / confusion.sum()),
        "class_accuracy": float((hit / true)[true > 0].mean()),
        "class_iou": float((hit / union)[union > 0].mean()),
    }
