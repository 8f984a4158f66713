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
            if group["muon_momentum"] is not None:
                gradients = {p: p.grad for p in group["params"] if p.grad is not None}
                if gradients:
                    self._step_filters(gradients, group["lr"], group["muon_momentum"])
        super().step()
        return loss

    def _step_filters(self, gradient_of: dict[Tensor, Tensor], lr: float | Tensor, momentum: float) -> None:
        """Updates convolutions' filters and clears their gradients, so that SGD's step leaves them alone."""
        filters, gradients = list(gradient_of), list(gradient_of.values())
        for weight in filters:
            if "muon_mean" not in self.state[weight]:
                self.state[weight]["muon_mean"] = torch.zeros_like(weight)
        means = [self.state[weight]["muon_mean"] for weight in filters]
        torch._foreach_mul_(means, momentum)
        torch._foreach_add_(means, gradients)
        for weight in filters:
            weight.mul_(len(weight) ** 0.5 / weight.norm())
        updates = torch._foreach_add(gradients, means, alpha=momentum)
        # [out, height, width, in], the memory order of channels_last filters
        rows = [update.permute(0, 2, 3, 1) for update in updates]
        for row, orthogonal in zip(rows, orthogonalize([row.flatten(1) for row in rows]), strict=True):
            row.copy_(orthogonal.view_as(row))
        if isinstance(lr, Tensor):
            torch._foreach_mul_(updates, lr)
            torch._foreach_sub_(filters, updates)
        else:
            torch._foreach_add_(filters, updates, alpha=-lr)
        for weight in filters:
            weight.grad = None


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """For each matrix [M, N] about the nearest one with orthonormal rows (or columns), in bf16 where it is fast.

    Three steps of a quintic Newton-Schulz iteration, x <- (a + b g + c g^2) x with g = x x^T. Jordan chose the
    coefficients for speed: the singular values end between about 0.5 and 1.5, which serves training as well as 1 does.
    The polynomials commute with g, so the steps run on the small matrix g, and x is multiplied once at the end. On a
    GPU those of one size run together, since a launch takes longer than their product.
    """
    dtype = torch.bfloat16 if fast_bf16(matrices[0].device) else matrices[0].dtype
    wide = []
    for matrix in matrices:
        x = matrix.to(dtype)
        x = x / (x.norm() + 1e-7)
        wide.append(x.T if x.shape[0] > x.shape[1] else x)
    products = _iterate([x @ x.T for x in wide])
    results = []
    for matrix, x, product in zip(matrices, wide, products, strict=True):
        result = product @ x
        results.append(result.T if matrix.shape[0] > matrix.shape[1] else result)
    return results


def _iterate(grams: list[Tensor]) -> list[Tensor]:
    """The product of the iteration's three polynomials, for each of the matrices g."""
    if grams[0].device.type != "cuda":
        return [_product(gram) for gram in grams]
    products: dict[int, Tensor] = {}
    for size in {len(gram): None for gram in grams}:
        numbers = [number for number, gram in enumerate(grams) if len(gram) == size]
        stacked = _product(torch.stack([grams[number] for number in numbers]))
        products |= dict(zip(numbers, stacked, strict=True))
    return [products[number] for number in range(len(grams))]


def _product(gram: Tensor) -> Tensor:
    """[..., M, M] -> [..., M, M]."""
    product = step = _polynomial(gram)
    for _ in range(2):
        gram = step @ gram @ step
        step = _polynomial(gram)
        product = step @ product
    return product


def _polynomial(gram: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    if gram.device.type == "cuda":  # two launches
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        return step
    return a * torch.eye(len(gram), dtype=gram.dtype, device=gram.device) + b * gram + c * gram @ gram
