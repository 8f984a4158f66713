"""Optimizers and schedules from their configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src.common.hardware import fast_bf16
from src.configuration.schema import SGD as SGDConfig
from src.configuration.schema import Adam, AdamW, Constant, Cosine, Linear, Step
from src.configuration.schema import Muon as MuonConfig


def build_optimizer(
    modules: Iterable[nn.Module], config: SGDConfig | MuonConfig | Adam | AdamW
) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of `modules`."""
    modules = list(modules)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if isinstance(config, SGDConfig):
        return _sparing(torch.optim.SGD(_groups(modules, parameters, config), lr=config.lr), parameters, config.l1)
    if isinstance(config, MuonConfig):
        filters = [p for p in parameters if p.ndim == 4]
        rest = _groups(modules, [p for p in parameters if p.ndim != 4], config.rest)
        return Muon(filters, rest, lr=config.lr, momentum=config.momentum)
    kind: Any = torch.optim.AdamW if isinstance(config, AdamW) else torch.optim.Adam
    betas = (config.beta1, config.beta2)
    # fused: one pass over the memory instead of ten, 2.5 times as fast on a CPU.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    made = kind(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=fused)
    # Lightning refuses to clip gradients of what can unscale them by itself, though bf16 scales nothing.
    made._step_supports_amp_scaling = False
    return _sparing(made, parameters, config.l1)


def _sparing(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], l1: float) -> torch.optim.Optimizer:
    """The optimizer, which minimises `l1` times the sum of the weights' magnitudes as well.

    Before each step the penalty's gradient, l1 * sign(weight), is added: the reported loss stays comparable with that
    of a run without. Weights are matrices and filters; what has one dimension (biases, norms) is free.
    """
    weights = [p for p in parameters if p.ndim > 1]

    def add_penalty(*_: Any) -> None:
        for weight in weights:
            if weight.grad is not None:
                weight.grad.add_(weight.detach().sign(), alpha=l1)

    if l1:
        optimizer.register_step_pre_hook(add_penalty)
    return optimizer


def _groups(modules: list[nn.Module], parameters: list[nn.Parameter], config: SGDConfig) -> list[dict[str, Any]]:
    """SGD's `parameters`, and those biases among them in a group of their own that are to learn faster.

    Decay acts through rate times decay, so theirs is divided by the same factor: all weights shrink alike.
    """
    norms = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)
    fast = {
        id(bias)
        for module in modules
        for m in module.modules()
        if isinstance(bias := getattr(m, "bias", None), Tensor)
        and bias.requires_grad
        and (isinstance(m, norms) or not m.weight.requires_grad)
    }
    factor = config.norm_bias_lr_factor
    shared = {"momentum": config.momentum, "nesterov": config.nesterov and config.momentum > 0}
    groups = [
        {"params": [p for p in parameters if id(p) not in fast], "lr": config.lr, "weight_decay": config.weight_decay},
        {
            "params": [p for p in parameters if id(p) in fast],
            "lr": config.lr * factor,
            "weight_decay": config.weight_decay / factor,
        },
    ]
    return [shared | group for group in groups if group["params"]]


class Muon(torch.optim.SGD):
    """SGD, which takes orthogonalised momentum for the gradient of filters (Jordan et al., 2024).

    https://kellerjordan.github.io/posts/muon. Filters [out, in, height, width] count as matrices [out, in * height *
    width]. Each keeps its norm, the square root of `out`, as in airbench: a batch norm after it undoes its scale. And
    torch.optim.Muon takes matrices only, and neither keeps norms nor has plain SGD beside it.

    Args:
        filters: what is orthogonalised.
        rest: parameter groups of plain SGD.
        lr: the filters' rate.
        momentum: the filters' momentum, Nesterov's.
    """

    def __init__(self, filters: Sequence[Tensor], rest: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        first = {"params": filters, "lr": lr, "muon_momentum": momentum}
        super().__init__([first, *({"muon_momentum": None} | group for group in rest)], lr=lr)

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
                if filters.grad is None:
                    continue
                state = self.state[filters]
                if "muon_mean" not in state:
                    state["muon_mean"] = torch.zeros_like(filters)
                mean = state["muon_mean"]
                mean.mul_(group["muon_momentum"]).add_(filters.grad)
                filters.mul_(len(filters) ** 0.5 / filters.norm())
                filters.grad.add_(mean, alpha=group["muon_momentum"])
                # [out, height * width * in], which filters in channels_last order are in memory
                rows = filters.grad.permute(0, 2, 3, 1)
                rows.copy_(orthogonalised(rows.flatten(1)).view_as(rows))
        super().step()
        return loss


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows (or columns): [M, N] -> [M, N], in bf16 where that is fast.

    Three steps of a quintic Newton-Schulz iteration, x <- (a + b g + c g^2) x with g = x x^T, whose coefficients Jordan
    chose for speed: the singular values end up between about 0.5 and 1.5, which serves training as well as 1 does. The
    polynomials commute with g, so that the steps are taken on the small g alone, and x is multiplied once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if fast_bf16(matrix.device) else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    gram = x @ x.T
    scale = a * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    product = scale + b * gram + c * gram @ gram
    step = product
    for _ in range(2):
        gram = step @ gram @ step
        step = scale + b * gram + c * gram @ gram
        product = step @ product
    x = product @ x
    return x.T if tall else x


def rate_factor(config: Constant | Linear | Cosine | Step, progress: float) -> float:
    """The factor on the learning rate after the fraction `progress` (0..1) of all steps."""
    if isinstance(config, Constant):
        return 1.0
    if isinstance(config, Step):
        return config.factor ** sum(progress >= milestone for milestone in config.milestones)
    if progress < config.warmup:
        return progress / config.warmup
    start = config.warmup + (config.hold if isinstance(config, Linear) else 0.0)
    if progress < start or start >= 1:
        return 1.0
    through = min(1.0, (progress - start) / (1 - start))
    fallen = through if isinstance(config, Linear) else (1 - math.cos(math.pi * through)) / 2
    return 1 + (config.final - 1) * fallen


def build_schedule(
    optimizer: torch.optim.Optimizer, config: Constant | Linear | Cosine | Step, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule that is stepped after each of `steps` optimizer steps.

    A warm-up begins one step above zero: a first step of rate zero would be a step for nothing.
    """
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(config, min(1.0, (step + 0.5) / max(1, steps)))
    )
