"""Layers that several networks share."""

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


def activation_layer(name: str) -> nn.Module:
    """The activation with this name; the leaky ReLU has a negative slope of 0.2, as in DCGAN."""
    return nn.LeakyReLU(0.2) if name == "leaky_relu" else ACTIVATIONS[name]()


def is_token(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Which positions of padded texts hold a token: [B, T, ...] and lengths [B] -> bool [B, T]."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None, :] < lengths[:, None]


def run_cells(cells: nn.Module, x: Tensor) -> Tensor:
    """The outputs of recurrent layers for all steps: [B, T, in] -> [B, T, hidden], on a GPU in fp32.

    There autocast computes them in fp16 whatever its type is (torch 2.12.1), and without scaling of the loss a tenth to
    a quarter of the gradient is lost. Their steps wait for each other, so fp32 costs next to nothing.
    """
    if x.device.type != "cuda":
        return cells(x)[0]
    with torch.autocast("cuda", enabled=False):
        return cells(x.float())[0]


def max_pool_2x2(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 2)` with the same bits, forward and backward: [B, C, H, W] -> [B, C, H/2, W/2], rounded down.

    For the gradient PyTorch keeps x and eight bytes per maximum, which on a CPU was half of the memory of a residual
    network's training step. Two bytes per maximum are enough, at the same speed.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not (x.requires_grad and torch.is_grad_enabled()):
        return F.max_pool2d(x, 2)
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    is_indexable = x.shape[2] * x.shape[3] <= _Pooling.MAX_PIXELS
    return _Pooling.apply(x) if is_channels_last and is_indexable else F.max_pool2d(x, 2)


class _Pooling(torch.autograd.Function):
    """PyTorch's 2x2 pooling over a few images at a time, with 16-bit indices kept for the backward pass.

    Uses the operators behind `F.max_pool2d`, which return the indices (checked with torch 2.12.1).
    """

    IMAGES = 25  # at a time: their 64-bit indices are small
    MAX_PIXELS = 2**15  # of a map, so that 16 bits hold an index

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pooled = torch.empty(
            (batch, channels, height // 2, width // 2), dtype=x.dtype, memory_format=torch.channels_last
        )
        indices = torch.empty_like(pooled, dtype=torch.int16)
        buffer = torch.empty_like(pooled[: _Pooling.IMAGES], dtype=torch.int64)
        for images, maxima, index in zip(*(t.split(_Pooling.IMAGES) for t in (x, pooled, indices)), strict=True):
            wide_index = buffer[: len(images)]
            torch.ops.aten.max_pool2d_with_indices.out(images, [2, 2], [2, 2], out=maxima, indices=wide_index)
            index.copy_(wide_index)
        ctx.shape = x.shape
        ctx.save_for_backward(indices)
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (pooled,), (indices,) = gradients, ctx.saved_tensors
        x_gradient = torch.empty(ctx.shape, dtype=pooled.dtype, memory_format=torch.channels_last)
        for out, into, index in zip(*(t.split(_Pooling.IMAGES) for t in (pooled, x_gradient, indices)), strict=True):
            # The second argument is the pooling's input, of which only the shape is used: the result has the same.
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                out, into, [2, 2], [2, 2], [0, 0], [1, 1], False, index.long(), grad_input=into
            )
        return x_gradient
