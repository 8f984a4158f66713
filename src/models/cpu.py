"""A convolution layer that is fast on small feature maps on a CPU in bf16."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.hardware import bf16_tiles


class Convolution(nn.Conv2d):
    """A 3x3 convolution without bias that keeps the size: [B, in, H, W] -> [B, out, H, W].

    On a CPU, PyTorch's bf16 convolutions process several pixels of one row at once: 16 on a processor that multiplies
    in tiles, 32 for the gradient of the filters. Rows of small maps fill a part of that only, so the maps are laid side
    by side in strips, with a column of zeros between two; up to nine times as fast.
    """

    SMALL = 8 if bf16_tiles() else 2  # maps up to this width, in pixels, are laid side by side
    STRIP = 64  # width of a strip, in pixels

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[3]
        if not (x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and width <= self.SMALL):
            return super().forward(x)
        maps = max(n for n in range(1, self.STRIP // (width + 1) + 1) if x.shape[0] % n == 0)  # in a strip
        rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 1)).unflatten(0, (-1, maps))  # [B/n, n, H, W+1, in]
        strips = super().forward(rows.transpose(1, 2).flatten(2, 3).permute(0, 3, 1, 2))  # [B/n, out, H, n*(W+1)]
        rows = strips.permute(0, 2, 3, 1).unflatten(2, (maps, -1))[:, :, :, :width]
        return rows.transpose(1, 2).flatten(0, 1).permute(0, 3, 1, 2)
