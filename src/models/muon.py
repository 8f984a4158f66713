"""Muon: momentum SGD whose updates of convolution filters are orthogonalised (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from src.common.hardware import fast_bf16


class Muon(torch.optim.SGD):
    """Muon for filters [out, in, height, width] and SGD for all other parameters.

    https://kellerjordan.github.io/posts/muon. Filters count as matrices [out, in * height * width]. Each keeps the norm
    sqrt(out), as in airbench: the batch norm after it removes its scale. torch.optim.Muon takes matrices only, keeps no
    norm and has no SGD for the other parameters.

    Args:
        filters: the parameters whose updates are orthogonalised.
        rest: parameter groups of SGD.
        lr: the learning rate of the filters.
        momentum: the Nesterov momentum of the filters.
    """

    def __init__(self, filters: Sequence[Tensor], rest: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        filter_group = {"params": filters, "lr": lr, "muon_momentum": momentum}
        super().__init__([filter_group, *({"muon_momentum": None} | group for group in rest)], lr=lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon_momentum"] is None:
                continue
            for filters in group["params"]:
                if filters.grad is not None:
                    self._step_filters(filters, group["lr"], group["muon_momentum"])
        super().step()
        return loss

    def _step_filters(self, filters: Tensor, lr: float, momentum: float) -> None:
        """Updates one convolution's filters and clears their gradient, so that SGD's step leaves them alone."""
        state, gradient = self.state[filters], filters.grad
        assert gradient is not None
        if "muon_mean" not in state:
            state["muon_mean"] = torch.zeros_like(filters)
        mean = state["muon_mean"]
        mean.mul_(momentum).add_(gradient)
        filters.mul_(len(filters) ** 0.5 / filters.norm())
        update = gradient.add(mean, alpha=momentum)
        rows = update.permute(0, 2, 3, 1)  # [out, height, width, in], the memory order of channels_last filters
        rows.copy_(orthogonalize(rows.flatten(1)).view_as(rows))
        filters.add_(update, alpha=-lr)
        filters.grad = None


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximately the nearest matrix with orthonormal rows (or columns): [M, N] -> [M, N], in bf16 where it is fast.

    Three steps of a quintic Newton-Schulz iteration, x <- (a + b g + c g^2) x with g = x x^T. Jordan chose the
    coefficients for speed: the singular values end between about 0.5 and 1.5, which serves training as well as 1 does.
    The polynomials commute with g, so the steps run on the small matrix g, and x is multiplied once at the end.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if fast_bf16(matrix.device) else matrix
    x = x / (x.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    gram = x @ x.T
    scale = a * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    product = scale + b * gram + c * gram @ gram
    step = product
    for _ in range(2):
        gram = step @ gram @ step
        step = scale + b * gram + c * gram @ gram
        product = step @ product
    x = product @ x
    return x.T if is_tall else x
