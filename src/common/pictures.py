"""Pictures as arrays: values in 0..1 as bytes, several side by side, and where a drawn one is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def to_bytes(images: Tensor) -> Tensor:
    """Images in 0..1 as uint8 of the same shape."""
    import torch

    return images.mul(255).round().to(torch.uint8)


def to_picture(image: np.ndarray) -> np.ndarray:
    """An image float [C, H, W] in 0..1 as PIL takes it: uint8 [H, W] or [H, W, 3]."""
    pixels = (image.transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8)
    return pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels


def mosaic(images: np.ndarray) -> np.ndarray:
    """Images [K, H, W, C] as one [down * H, across * W, C], about as many across as down; missing ones are black."""
    count, height, width, channels = images.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    tiles = np.zeros((across * down, height, width, channels), images.dtype)
    tiles[:count] = images
    rows = tiles.reshape(down, across, height, width, channels).transpose(0, 2, 1, 3, 4)
    return rows.reshape(down * height, across * width, channels)


def spread(columns: Mapping[str, Tensor], count: int) -> dict[str, np.ndarray]:
    """At most `count` images of each column, [N, C, H, W], at equal distances from first to last, as [K, H, W, C]."""
    total = len(next(iter(columns.values())))
    indices = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    return {name: images[indices].permute(0, 2, 3, 1).numpy() for name, images in columns.items()}


def beside(source: str | None, name: str) -> Path:
    """Where the picture that a model called `name` draws from a file goes: beside the file."""
    path = Path(source or "")
    return path.with_name(f"{path.stem}-{name}.png")
