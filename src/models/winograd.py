"""3x3 convolutions with a quarter of the multiplications (Winograd; Lavin and Gray, 2016), for training on a CPU.

F(4x4, 3x3): each 4x4 tile of the output is computed from a 6x6 tile of the input in 36 multiplications per pair of
channels instead of 144, and so are both gradients. In fp32 the result differs from the direct one by about 1e-5 of the
largest value. On an AVX2 processor forward and backward pass together are 1.5 times as fast with 128 channels and twice
as fast with 256; with fewer channels the transforms cost what the multiplications save.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE, PATCH = 4, 6  # pixels a side: of the output, and of the input that it depends on
CHANNELS = 96  # of input and output, from which on it pays

# The transforms of one dimension for the points 0, 1, -1, 2, -2 and infinity.
INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

_kept: list[dict[int, Tensor]] = []  # of each `unchanged_weights`, innermost last: filters by the weight's id


def is_worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether a training step computes this convolution faster here than PyTorch does."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and min(weight.shape[:2]) >= CHANNELS
        and not any((side - PATCH) % TILE for side in x.shape[2:])
    )


@contextlib.contextmanager
def unchanged_weights() -> Iterator[None]:
    """Within it no weight changes: the filters of each are transformed once. Not for several threads."""
    _kept.append({})
    try:
        yield
    finally:
        _kept.pop()


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The 3x3 convolution without padding: [B, C, H + 2, W + 2] and [K, C, 3, 3] -> [B, K, H, W], channels last.

    H and W are multiples of four.
    """
    # Fused optimizers change a weight without a new version: only the caller knows how long filters are good.
    kept = _kept[-1] if _kept else {}
    if id(weight) not in kept:
        kept[id(weight)] = _transformed(weight.detach())
    result: Tensor = _Convolution.apply(x.permute(0, 2, 3, 1), weight, kept[id(weight)])
    return result.permute(0, 3, 1, 2)


def _transformed(weight: Tensor) -> Tensor:
    """The filters of [K, C, 3, 3] as they are multiplied: [36, C, K]."""
    outputs, channels = weight.shape[:2]
    taps = weight.permute(2, 3, 1, 0).reshape(9, -1)
    return (_both_dimensions(FILTER, weight.dtype) @ taps).view(PATCH**2, channels, outputs)


@functools.cache
def _both_dimensions(rows: tuple[tuple[float, ...], ...], dtype: torch.dtype) -> Tensor:
    """The transform of a tile's rows and columns as one matrix."""
    matrix = torch.tensor(rows, dtype=dtype)
    return torch.kron(matrix, matrix)


def _patches(x: Tensor, corner: tuple[int, int] = (0, 0), size: tuple[int, int] = (PATCH, PATCH)) -> Tensor:
    """Overlapping patches of [B, H, W, C]: a view [*size, B, rows, columns, C] that begins at the pixel `corner`."""
    batch, height, width, channels = x.shape
    rows, columns = (height - PATCH) // TILE + 1, (width - PATCH) // TILE + 1
    across, down, right, deep = x.stride()
    return x.as_strided(
        (*size, batch, rows, columns, channels),
        (down, right, across, TILE * down, TILE * right, deep),
        x.storage_offset() + corner[0] * down + corner[1] * right,
    )


class _Convolution(torch.autograd.Function):
    """x [B, H + 2, W + 2, C], weight [K, C, 3, 3] -> [B, H, W, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, filters: Tensor) -> Tensor:
        outputs, channels = weight.shape[:2]
        patches = _patches(x)
        _, _, batch, rows, columns, _ = patches.shape
        inputs = (_both_dimensions(INPUT, x.dtype) @ patches.reshape(PATCH**2, -1)).view(PATCH**2, -1, channels)
        products = torch.bmm(inputs, filters).view(PATCH**2, -1)
        tiles = (_both_dimensions(OUTPUT, x.dtype) @ products).view(TILE, TILE, batch, rows, columns, outputs)
        ctx.save_for_backward(inputs, filters)
        ctx.shape = x.shape
        return tiles.permute(2, 3, 0, 4, 1, 5).reshape(batch, TILE * rows, TILE * columns, outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, filters = ctx.saved_tensors
        batch, height, width, outputs = gradient.shape
        channels = filters.shape[1]
        tiles = gradient.reshape(batch, height // TILE, TILE, width // TILE, TILE, outputs).permute(2, 4, 0, 1, 3, 5)
        products = (_both_dimensions(OUTPUT, gradient.dtype).T @ tiles.reshape(TILE**2, -1)).view(PATCH**2, -1, outputs)
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            patches = torch.bmm(products, filters.transpose(1, 2)).view(PATCH**2, -1)
            patches = (_both_dimensions(INPUT, gradient.dtype).T @ patches).view(
                PATCH, PATCH, batch, *tiles.shape[3:5], channels
            )
            x_gradient = gradient.new_zeros(ctx.shape)
            # Patches overlap by two pixels: parts whose pixels lie apart are added at once.
            for top, down in ((0, TILE), (TILE, PATCH)):
                for left, right in ((0, TILE), (TILE, PATCH)):
                    part = patches[top:down, left:right]
                    _patches(x_gradient, (top, left), (down - top, right - left)).add_(part)
        if ctx.needs_input_grad[1]:
            taps = torch.bmm(inputs.transpose(1, 2), products).view(PATCH**2, -1)
            taps = (_both_dimensions(FILTER, gradient.dtype).T @ taps).view(3, 3, channels, outputs)
            weight_gradient = taps.permute(3, 2, 0, 1)
        return x_gradient, weight_gradient, None
