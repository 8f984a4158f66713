"""Augmentation of whole batches, on the device that the data lies on.

Random numbers come from the generator that is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(
    images: Tensor, chosen: Tensor, padding: int, mirrored: Tensor | None, random: torch.Generator
) -> Tensor:
    """Random crops of the old size out of images that are padded by reflection, some of them mirrored.

    Nothing is padded or mirrored on the way: pixels are copied to where they belong.

    Args:
        images: uint8 [N, C, H, W], the whole split or a part of it.
        chosen: int64 [B], the batch's places there.
        padding: pixels on each side; smaller than H and W.
        mirrored: bool [B] or None.
        random: a CPU generator.

    Returns:
        uint8 [B, C, H, W].
    """
    if not padding and mirrored is None:
        return images[chosen]
    _, _, height, width = images.shape
    shift = torch.randint(-padding, padding + 1, (2, len(chosen), 1), generator=random)
    shift = shift.to(images.device, non_blocking=True)
    rows = _reflect(torch.arange(height, device=images.device) + shift[0], height)
    columns = _reflect(torch.arange(width, device=images.device) + shift[1], width)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return pixels_at(images, chosen, rows, columns)


def pixels_at(images: Tensor, chosen: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of each chosen image, int64 [B], its pixels at these rows, int64 [B, h], and columns, int64 [B, w].

    [N, C, H, W] -> [B, C, h, w]; on a GPU by one gather from all images. On a CPU that takes 1.3 ms of a core for an
    image of 224x224, numpy's `take` of each image 0.2.
    """
    if images.device.type == "cpu":
        pixels = images.new_empty((len(chosen), images.shape[1], rows.shape[1], columns.shape[1]))
        parts = zip(pixels.numpy(), chosen.tolist(), rows.numpy(), columns.numpy(), strict=True)
        for target, number, vertical, horizontal in parts:
            # Any mode but "raise", which would copy once more; all indices are within the image.
            images[number].numpy().take(vertical, 1).take(horizontal, 2, out=target, mode="clip")
        return pixels
    channels = torch.arange(images.shape[1], device=images.device)
    return images[
        chosen[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond the edge, mirrored at it (the edge itself is not repeated)."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def rotate(images: Tensor, degrees: float, random: torch.Generator) -> Tensor:
    """Images turned about their middle by angles drawn from -degrees..degrees; what comes in at the corners is black.

    uint8 [B, C, H, W] -> uint8 [B, C, H, W], in pixels between others interpolated.
    """
    angles = (2 * torch.rand(len(images), generator=random) - 1) * math.radians(degrees)
    cos, sin = angles.cos(), angles.sin()
    ratio = images.shape[2] / images.shape[3]  # the grid counts either side as -1..1
    turn = torch.stack([cos, -sin * ratio, 0 * cos, sin / ratio, cos, 0 * cos], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def cut_out(images: Tensor, size: int, colour: Tensor, random: torch.Generator) -> Tensor:
    """Images with a square of `size` pixels a side in one colour (DeVries and Taylor, 2017), wholly within the image.

    uint8 [B, C, H, W] and uint8 [C] -> uint8 [B, C, H, W].
    """

    def inside(length: int) -> Tensor:
        """bool [B, length]"""
        start = torch.randint(0, max(1, length - size + 1), (len(images), 1), generator=random)
        position = torch.arange(length, device=images.device) - start.to(images.device, non_blocking=True)
        return (position >= 0) & (position < size)

    rows, columns = inside(images.shape[2]), inside(images.shape[3])
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], colour[:, None, None], images)


def shrink(images: Tensor, size: int) -> Tensor:
    """Images brought to `size` x `size`, each new pixel the mean over the old ones that it covers.

    uint8 [B, C, H, W] -> uint8 [B, C, size, size].
    """
    # Only the CPU resizes bytes.
    pixels = images if images.device.type == "cpu" else images.float()
    small = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return small if small.dtype == torch.uint8 else small.round().to(torch.uint8)


def jitter_pair(
    source: Tensor, target: Tensor, *, enlarge: float, flip: bool, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """pix2pix's jitter, the same for both (Isola et al., 2017, section 6.2).

    Enlarged by `enlarge`, cropped at random to the old size, mirrored half the time. Both uint8 [B, 3, S, S], as are
    the results.
    """
    size = source.shape[-1]
    resize = round(size * enlarge)
    both = torch.cat([source, target], dim=1)
    pairs = []
    for pair in both:
        if resize > size:
            top, left = torch.randint(0, resize - size + 1, (2,), generator=random).tolist()
            large = F.interpolate(pair[None].float(), size=(resize, resize), mode="bilinear", antialias=False)[0]
            pair = large[:, top : top + size, left : left + size].round().to(torch.uint8)
        if flip and torch.rand((), generator=random) < 0.5:
            pair = pair.flip(-1)
        pairs.append(pair)
    jittered = torch.stack(pairs)
    return jittered[:, :3], jittered[:, 3:]
