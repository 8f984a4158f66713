"""Distances between a set of drawn images and a set of real ones, in quality and in variety."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from src.common.errors import Failure

COARSE = 7  # pixels a side at which validation compares drawn images with real ones
COMPARED = 5000  # images whose distances to each other are measured: memory grows with the square


class DrawnAgainstReal(Metric):
    """The Frechet distance at 7x7 pixels and the diversity of drawn images, over an epoch and all processes.

    Neither is a mean over batches: the distance of two small sets is larger than that of two large ones.
    """

    full_state_update = False
    real: list[Tensor]  # features of the real images, float [N, D]
    drawn: list[Tensor]
    real_images: list[Tensor]  # uint8 [N, C, H, W]
    drawn_images: list[Tensor]  # fp32 [N, C, H, W] in 0..1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("real", "drawn", "real_images", "drawn_images"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @property
    def real_count(self) -> int:
        """The number of this process's real images."""
        return sum(len(part) for part in self.real)

    def update(self, real: Tensor | None = None, drawn: Tensor | None = None) -> None:
        """Adds real images, uint8 [N, C, H, W], or drawn ones, fp32 in 0..1."""
        if real is not None:
            _add(self.real, self.real_images, real, real.float() / 255)
        if drawn is not None:
            _add(self.drawn, self.drawn_images, drawn, drawn)

    def compute(self) -> dict[str, float]:
        """Both figures by name.

        Raises:
            Failure: of fewer than two images there is no distance.
        """
        states = (self.real, self.drawn, self.real_images, self.drawn_images)
        real, drawn, real_images, drawn_images = map(dim_zero_cat, states)  # of several processes tensors already
        if len(real) < 2:
            raise Failure(
                "val_frechet: one validation image has no distribution; take more, with trainer.limit_val_batches "
                "or data.loader.eval_batch_size"
            )
        variety = diversity(real_images[:COMPARED].float() / 255, drawn_images[:COMPARED])
        return {"diversity": variety, "frechet": frechet_distance(real, drawn)}


def _add(features: list[Tensor], kept: list[Tensor], images: Tensor, scaled: Tensor) -> None:
    features.append(F.adaptive_avg_pool2d(scaled, COARSE).flatten(1))
    if sum(len(part) for part in kept) < COMPARED:
        kept.append(images)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The Frechet distance of the Gaussians fitted to two sets of features, [N, D] and [M, D] (Heusel et al., 2017).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) with means m and covariances C, in double precision. N and M at least 2.
    """
    first, second = first.double(), second.double()
    apart = (first.mean(0) - second.mean(0)).square().sum()
    one, other = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # (C1 C2)^1/2 has the trace of (C1^1/2 C2 C1^1/2)^1/2, which is symmetric.
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(apart + one.trace() + other.trace() - 2 * shared))


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019) of features [N, D] and [M, D], each in 0..1.

    A set's manifold is the union of balls around its points, each as large as the distance to the point's third-nearest
    neighbour. Precision is the share of drawn points in the real manifold, recall that of real ones in the drawn.
    """
    return _inside(drawn, real, neighbours), _inside(real, drawn, neighbours)


def _inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """The share of points that lie in a ball of the manifold."""
    nearest = (
        torch.cdist(manifold, manifold).topk(neighbours + 1, largest=False).values
    )  # the first is the point itself
    return float((torch.cdist(points, manifold) <= nearest[:, -1]).any(1).double().mean())


def diversity(real: Tensor, drawn: Tensor) -> float:
    """How far a drawn image is from the most similar other one, beside what that is among real ones.

    Medians over distances in pixels, [N, ...] and [M, ...], N and M at least 2: 1 for as much variety as there is,
    0 where all are the same. Few images again and again have little, however much these few differ.
    """
    real_gap, drawn_gap = (_to_nearest(images.float().flatten(1)).median() for images in (real, drawn))
    return float(drawn_gap / real_gap.clamp_min(1e-12))


def _to_nearest(points: Tensor) -> Tensor:
    distances = torch.cdist(points, points)
    return distances.fill_diagonal_(torch.inf).amin(1)
