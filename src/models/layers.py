"""What several networks are built of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
}


def activated(name: str) -> nn.Module:
    """The activation of that name; a leaky ReLU lets a fifth of what is negative pass, as in DCGAN."""
    return nn.LeakyReLU(0.2) if name == "leaky_relu" else ACTIVATIONS[name]()


def max_pool_2x2(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 2)`, [B, C, H, W] -> [B, C, H/2, W/2] rounded down, the same bits, forward and backward.

    For its gradient the library keeps x itself and eight bytes per maximum; on a CPU that was half of what a residual
    network's training step holds. Two bytes per maximum suffice, at the same speed.
    """
    lean = x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if lean and x.is_contiguous(memory_format=torch.channels_last) and x.shape[2] * x.shape[3] <= _Pooling.PLACES:
        return _Pooling.apply(x)
    return F.max_pool2d(x, 2)


class _Pooling(torch.autograd.Function):
    """The library's 2x2 pooling over a few images at a time, so that its eight bytes per maximum never pile up."""

    IMAGES = 25
    PLACES = 2**15  # in a map that 16 bits can number

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pooled = torch.empty(
            (batch, channels, height // 2, width // 2), dtype=x.dtype, memory_format=torch.channels_last
        )
        places = torch.empty_like(pooled, dtype=torch.int16)
        wide = torch.empty_like(pooled[: _Pooling.IMAGES], dtype=torch.int64)
        for some, into, place in zip(*(t.split(_Pooling.IMAGES) for t in (x, pooled, places)), strict=True):
            chosen = wide[: len(some)]
            torch.ops.aten.max_pool2d_with_indices.out(some, [2, 2], [2, 2], out=into, indices=chosen)
            place.copy_(chosen)
        ctx.shape = x.shape
        ctx.save_for_backward(places)
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (places,) = gradients, ctx.saved_tensors
        whole = torch.empty(ctx.shape, dtype=gradient.dtype, memory_format=torch.channels_last)
        for some, into, place in zip(*(t.split(_Pooling.IMAGES) for t in (gradient, whole, places)), strict=True):
            # Of its input the library wants the shape alone, which the result has.
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                some, into, [2, 2], [2, 2], [0, 0], [1, 1], False, place.long(), grad_input=into
            )
        return whole
