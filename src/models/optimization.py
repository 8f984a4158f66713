"""Optimizers and learning rate schedules, built from their configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from src.common.errors import Failure
from src.configuration.schema import SGD as SGDConfig
from src.configuration.schema import STEPS, Adam, AdamW, Build, Constant, Cosine, Linear, Step
from src.configuration.schema import Muon as MuonConfig
from src.models.muon import Muon


def build_optimizer(
    modules: Iterable[nn.Module],
    config: SGDConfig | MuonConfig | Adam | AdamW | Build,
    rate_factors: Mapping[nn.Parameter, float] = {},
) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of `modules`.

    `rate_factors`: parameters whose learning rate is that multiple of the configured one.

    Raises:
        Failure: the class of a `_target_` refuses its arguments, or takes no rates of single parameters.
    """
    modules = list(modules)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if rate_factors and isinstance(config, Build | MuonConfig):
        raise Failure("model.optimizer: only sgd, adam and adamw give layers rates of their own; use one of them")
    if isinstance(config, Build):
        optimizer: torch.optim.Optimizer = _build(config, parameters, "model.optimizer")
    elif isinstance(config, SGDConfig):
        sgd_groups = _with_rates(_sgd_groups(modules, parameters, config), rate_factors)
        optimizer = torch.optim.SGD(sgd_groups, lr=config.lr)
        _add_l1(optimizer, parameters, config.l1)
    elif isinstance(config, MuonConfig):
        groups = _sgd_groups(modules, [p for p in parameters if p.ndim != 4], config.rest)
        optimizer = Muon([p for p in parameters if p.ndim == 4], groups, lr=config.lr, momentum=config.momentum)
    else:
        optimizer_class: Any = torch.optim.AdamW if isinstance(config, AdamW) else torch.optim.Adam
        optimizer = optimizer_class(
            _with_rates([{"params": parameters, "lr": config.lr}], rate_factors) if rate_factors else parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            # One pass over the memory instead of ten, 2.5 times as fast on a CPU.
            fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
        )
        _add_l1(optimizer, parameters, config.l1)
    # Lightning (2.6.6) refuses to clip the gradients of fused optimizers, which can unscale them (torch 2.12.1);
    # in fp32 and bf16 nothing is scaled.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _with_rates(groups: list[dict[str, Any]], factors: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """Parameter groups split by the factors on their parameters' learning rates, in the order of the parameters."""
    if not factors:
        return groups
    split = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        split += [group | {"params": part, "lr": group["lr"] * factor} for factor, part in parts.items()]
    return split


def _build(config: Build, subject: Any, path: str) -> Any:
    """Calls the class of `_target_` with `subject` (parameters or an optimizer) and the section's keys.

    Raises:
        Failure: the class refuses its arguments; `path` is the section's.
    """
    try:
        return config(subject)
    except (TypeError, ValueError, KeyError) as error:
        raise Failure(f"{path}: {config.target} refuses its arguments: {error}") from error


def _add_l1(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], l1: float) -> None:
    """Has the optimizer minimise `l1` times the sum of the weights' magnitudes beside the loss.

    The penalty's gradient, l1 * sign(weight), is added before each step, so the reported loss stays comparable with
    that of a run without penalty. Parameters of one dimension (biases, norms) carry no penalty.
    """
    if not l1:
        return
    weights = [p for p in parameters if p.ndim > 1]

    def add_gradient(*_: Any) -> None:
        for weight in weights:
            if weight.grad is not None:
                weight.grad.add_(weight.detach().sign(), alpha=l1)

    optimizer.register_step_pre_hook(add_gradient)


def _sgd_groups(modules: list[nn.Module], parameters: list[nn.Parameter], config: SGDConfig) -> list[dict[str, Any]]:
    """SGD's parameter groups: `parameters`, with the biases of norms and frozen layers in a group of their own.

    That group has the learning rate times `norm_bias_lr_factor`. Decay acts as rate times decay, so its decay is
    divided by the factor: all weights shrink alike.
    """
    norms = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)
    fast = {
        id(bias)
        for module in modules
        for layer in module.modules()
        if isinstance(bias := getattr(layer, "bias", None), Tensor)
        and bias.requires_grad
        and (isinstance(layer, norms) or not layer.weight.requires_grad)
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
    decayed = min(1.0, (progress - start) / (1 - start))
    drop = decayed if isinstance(config, Linear) else (1 - math.cos(math.pi * decayed)) / 2
    return 1 + (config.final - 1) * drop


def build_schedule(
    optimizer: torch.optim.Optimizer, config: Constant | Linear | Cosine | Step | Build, steps: int
) -> LRScheduler:
    """A schedule that is stepped after each of `steps` optimizer steps.

    A warm-up begins half a step above zero, so that the first step has an effect.

    Raises:
        Failure: the class of a `_target_` refuses its arguments.
    """
    if isinstance(config, Build):
        counts = {key: steps for key, value in config if value == STEPS}
        schedule: LRScheduler = _build(config.model_copy(update=counts), optimizer, "model.schedule")
        return schedule
    return LambdaLR(optimizer, lambda step: rate_factor(config, min(1.0, (step + 0.5) / max(1, steps))))
