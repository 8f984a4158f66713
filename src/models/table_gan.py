"""The dense GAN on rows of numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from src.common.errors import Failure
from src.models.fidelity import COMPARED, DrawnAgainstReal, diversity, frechet_distance
from src.models.gan import GAN


class RowsAgainstReal(DrawnAgainstReal):
    """The Frechet distance and the diversity of generated rows, over an epoch and all processes."""

    def update(self, real: Tensor | None = None, drawn: Tensor | None = None) -> None:
        """Adds real or generated rows, fp32 [N, D]."""
        if real is not None:
            self.real.append(real)
        if drawn is not None:
            self.drawn.append(drawn)

    def compute(self) -> dict[str, float]:
        """Both figures by name.

        Raises:
            Failure: of fewer than two rows there is no distance.
        """
        real, drawn = map(dim_zero_cat, (self.real, self.drawn))
        if len(real) < 2:
            raise Failure("val_frechet: one validation row has no distribution; take more, with data.val_fraction")
        return {
            "diversity": diversity(real[:COMPARED], drawn[:COMPARED]),
            "frechet": frechet_distance(real, drawn),
        }


class TableGAN(GAN):
    """A generator of rows, standardised numbers; everything else is the GAN's."""

    task = "table_generation"

    def distances(self) -> DrawnAgainstReal:
        return RowsAgainstReal()

    def real(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The rows, fp32 [B, D]."""
        return batch[0]

    def forward(self, latent: Tensor) -> Tensor:
        """float [B, latent] -> float [B, D], standardised."""
        rows: Tensor = self.generator(latent)
        return rows

    @torch.no_grad()
    def draw(self, count: int, seed: int) -> Tensor:
        """Rows fp32 [count, D] on the CPU, the same for the same seed."""
        return self.answer(self.draw_latents(count, seed)).cpu()
