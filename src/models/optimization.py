"""Optimizers and schedules from their configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from src.config import SGD, Adam, AdamW, Constant, Cosine, Linear, Step


def build_optimizer(modules: Iterable[nn.Module], config: SGD | Adam | AdamW) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of `modules`."""
    modules = list(modules)
    if isinstance(config, SGD):
        shared = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov and config.momentum > 0}
        return torch.optim.SGD(_groups(modules, config), **shared)  # type: ignore[arg-type]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    kind: Any = torch.optim.AdamW if isinstance(config, AdamW) else torch.optim.Adam
    return kind(parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)


def _groups(modules: list[nn.Module], config: SGD) -> list[dict[str, Any]]:
    """Normalisation biases in a group of their own when they are to learn faster.

    Decay acts through rate times decay, so theirs is divided by the same factor: all weights shrink alike.
    """
    norms = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)
    fast = {
        id(m.bias)
        for module in modules
        for m in module.modules()
        if isinstance(m, norms) and m.bias is not None and m.bias.requires_grad
    }
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    factor = config.norm_bias_lr_factor
    groups = [{"params": [p for p in parameters if id(p) not in fast], "weight_decay": config.weight_decay}]
    if biases := [p for p in parameters if id(p) in fast]:
        groups.append({"params": biases, "lr": config.lr * factor, "weight_decay": config.weight_decay / factor})
    return [group for group in groups if group["params"]]


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
