"""Distances between sets of images in the features of a fixed random network, for models that translate images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from src.common.errors import Failure

EXTRACTOR = "random-conv-1"  # what `RandomFeatures` computes; another network gets another number
WIDTHS = (32, 64, 128)
IMAGES_AT_ONCE = 32


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """KID (Binkowski et al., 2018) of two sets of features, [N, D] and [M, D]: the unbiased squared MMD.

    The kernel is (x.y / D + 1)^3; computed in double precision over all pairs. Near 0, also below it, for two samples
    of one distribution. N and M at least 2.
    """
    first, second = first.double(), second.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def among(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(among(first) + among(second) - 2 * kernel(first, second).mean())


def random_filters() -> Iterator[Tensor]:
    """The filters of the extractor's layers, [out, in, 3, 3] fp32, the same on every machine."""
    random = np.random.default_rng(0)
    for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
        filters = random.normal(0, np.sqrt(2 / (9 * inputs)), (outputs, inputs, 3, 3))
        yield torch.from_numpy(filters.astype(np.float32))


def random_features(images: Tensor, filters: list[Tensor]) -> Tensor:
    """Mean and deviation of each channel of the image and of three layers of random filters.

    uint8 [N, 3, H, W] -> fp32 [N, 454]. Such statistics tell textures and colours apart (Ulyanov et al., 2016); unlike
    a network trained on ImageNet they know no objects.
    """
    parts = []
    for batch in images.split(IMAGES_AT_ONCE):
        x = batch.float() / 127.5 - 1
        moments = []
        for number in range(len(filters) + 1):
            if number:
                x = F.conv2d(x if number == 1 else F.avg_pool2d(x, 2), filters[number - 1], padding=1).relu()
            mean = x.mean((2, 3))
            deviation = (x.square().mean((2, 3)) - mean.square()).clamp_min(0).sqrt()
            moments += [mean, deviation]
        parts.append(torch.cat(moments, 1))
    return torch.cat(parts)


class TranslationDistances(Metric):
    """KID between translated and real images of both domains, over an epoch and all processes."""

    full_state_update = False
    SETS = ("a", "b", "to_a", "to_b")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers = len(WIDTHS)
        for number, filters in enumerate(random_filters()):
            self.register_buffer(f"filters_{number}", filters, persistent=False)
        for name in self.SETS:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, name: str, images: Tensor) -> None:
        """Adds images, uint8 [N, 3, H, W], to one of SETS."""
        filters = [getattr(self, f"filters_{number}") for number in range(self.layers)]
        with torch.autocast(images.device.type, enabled=False):
            if len(images):
                getattr(self, name).append(random_features(images, filters))

    def compute(self) -> dict[str, float]:
        """`kid_to_a`, `kid_to_b` and `kid`, their mean.

        Raises:
            Failure: of fewer than two images there is no distance.
        """
        states = {name: getattr(self, name) for name in self.SETS}
        sets = {name: dim_zero_cat(state) for name, state in states.items() if len(state)}
        if len(sets) < len(states) or min(map(len, sets.values())) < 2:
            raise Failure(
                "val_kid: a domain has fewer than two validation images; take more, with data.val_fraction or "
                "trainer.limit_val_batches"
            )
        distances = {f"kid_to_{domain}": kernel_distance(sets[f"to_{domain}"], sets[domain]) for domain in "ab"}
        return distances | {"kid": sum(distances.values()) / 2}
