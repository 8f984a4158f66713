"""Augmentation of images with boxes, as SSD is trained (Liu et al., 2016, section 2.2).

Canvases and crops are drawn by torchvision's v2 transforms. Their effect is put together: each image is resampled once,
and its colours are changed by one matrix.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

SMALLEST = 1.0  # pixels; a box whose visible part has a smaller side is dropped
GREY = (0.299, 0.587, 0.114)  # luma of red, green and blue
# Factors as in SSD's code; the hue is turned in the plane of the two colour differences of YIQ.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.125, 0.5, 0.5, 0.05
YIQ = (GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class Options(Protocol):
    """What may be done to an image: the keys of the options."""

    @property
    def flip(self) -> str: ...
    @property
    def zoom_out(self) -> float: ...
    @property
    def zoom_largest(self) -> float: ...
    @property
    def iou_crop(self) -> float: ...
    @property
    def crop_smallest(self) -> float: ...
    @property
    def photometric(self) -> float: ...


@dataclass(frozen=True)
class Window:
    """The part of an image that is shown in its place, in pixels; it may reach beyond the image."""

    left: int
    top: int
    width: int
    height: int


def augment(
    images: Tensor,
    boxes: Tensor,
    labels: Tensor,
    ignored: Tensor,
    options: Options,
    *,
    margin: int,
    random: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch with changed colours, zoomed out, cropped and mirrored, in its old size.

    Args:
        images: uint8 [B, 3, H, W].
        boxes: fp32 [B, M, 4], xyxy in pixels, on the CPU.
        labels: int64 [B, M], -1 where there is no box; the boxes of an image come first.
        ignored: bool [B, M].
        margin: the grey of what lies beyond an image.
        random: keys all that is drawn; the global generator, which the transforms use, is left as it was.

    Returns:
        The same four. A crop keeps the boxes whose centre it holds; the others are gone.
    """
    height, width = images.shape[-2:]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random.initial_seed())
        mirrored = torch.rand(len(images)) < 0.5 if options.flip == "random" else None
        matrices = _colour_matrices(images, options.photometric) if options.photometric else None
        rows = [
            _window(image_boxes[is_box], (height, width), options)
            for image_boxes, is_box in zip(boxes, labels >= 0, strict=True)
        ]
    if matrices is not None:
        images = _recoloured(images, *matrices)
    windows = [window for window, _ in rows]
    if any(window != Window(0, 0, width, height) for window in windows):
        images = torch.stack([_shown(image, window, margin) for image, window in zip(images, windows, strict=True)])
        seen = torch.tensor([(window.left, window.top, window.width, window.height) for window in windows])
        scale = torch.tensor([width, height]) / seen[:, 2:]
        boxes = (boxes.view(*boxes.shape[:2], 2, 2) - seen[:, None, None, :2]) * scale[:, None, None]
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height])).flatten(2)
        kept = labels >= 0
        for row, (_, is_within) in enumerate(rows):
            if is_within is not None:
                kept[row, : len(is_within)] &= is_within
        kept &= ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST).all(-1)
        order = (~kept).int().argsort(dim=1, stable=True)  # those that are kept come first again
        kept = kept.gather(1, order)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * kept[..., None]
        labels = torch.where(kept, labels.gather(1, order), -1)
        ignored = ignored.gather(1, order) & kept
    if mirrored is not None:
        images = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device, non_blocking=True), images.flip(-1), images)
        left, top, right, bottom = boxes.unbind(-1)
        turned = torch.stack([width - right, top, width - left, bottom], -1)
        boxes = torch.where(mirrored[:, None, None] & (labels >= 0)[..., None], turned, boxes)
    return images, boxes, labels, ignored


@functools.cache
def _crop(smallest: float) -> v2.RandomIoUCrop:
    return v2.RandomIoUCrop(min_scale=smallest)


@functools.cache
def _zoom(largest: float) -> v2.RandomZoomOut:
    return v2.RandomZoomOut(side_range=(1.0, largest))


def _window(boxes: Tensor, size: tuple[int, int], options: Options) -> tuple[Window, Tensor | None]:
    """Draws what is shown of an image with these boxes, [N, 4], and which of them a crop keeps: bool [N].

    None in place of the latter: there is no crop.
    """
    height, width = size
    left = top = 0
    is_zoomed, is_cropped = (torch.rand(2) < torch.tensor([options.zoom_out, options.iou_crop])).tolist()
    if is_zoomed:
        canvas = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        before, above, after, below = _zoom(options.zoom_largest).make_params([canvas])["padding"]
        left, top, width, height = -before, -above, width + before + after, height + above + below
    within = None
    if is_cropped and len(boxes):
        moved = boxes - torch.tensor([left, top, left, top])
        canvas = tv_tensors.BoundingBoxes(moved, format="XYXY", canvas_size=(height, width))
        if crop := _crop(options.crop_smallest).make_params([canvas]):
            left, top, width, height = left + crop["left"], top + crop["top"], crop["width"], crop["height"]
            within = crop["is_within_crop_area"]
    return Window(left, top, width, height), within


def _shown(image: Tensor, window: Window, margin: int) -> Tensor:
    """The window of an image uint8 [3, H, W] in the image's size; what lies beyond the image is grey."""
    height, width = image.shape[-2:]
    if window == Window(0, 0, width, height):
        return image
    x0, x1 = max(window.left, 0), min(window.left + window.width, width)
    y0, y1 = max(window.top, 0), min(window.top + window.height, height)
    left, right = (round((x - window.left) * width / window.width) for x in (x0, x1))
    top, bottom = (round((y - window.top) * height / window.height) for y in (y0, y1))
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    part = image[None, :, y0:y1, x0:x1]
    pixels = part if image.device.type == "cpu" else part.float()  # only the CPU resizes bytes
    inner = F.interpolate(pixels, size=(bottom - top, right - left), mode="bilinear", antialias=True)
    inner = inner if inner.dtype == torch.uint8 else inner.round().clamp(0, 255).to(torch.uint8)
    if inner.shape[-2:] == image.shape[-2:]:
        return inner[0]
    canvas = torch.full_like(image, margin)
    canvas[:, top:bottom, left:right] = inner[0]
    return canvas


def _colour_matrices(images: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Draws a change of colours for each image: matrices fp32 [B, 3, 3], and how much of its mean grey is added [B].

    Brightness, saturation, hue, the order of the channels and contrast, each with the probability.
    """
    count = len(images)

    def drawn(spread: float) -> Tensor:
        """Factors around 1, [B, 1, 1]."""
        factors = 1 + spread * (2 * torch.rand(count, 1, 1) - 1)
        return torch.where(torch.rand(count, 1, 1) < probability, factors, 1)

    eye = torch.eye(3)
    grey = torch.tensor(GREY).expand(3, 3)
    brightness, contrast, saturation = drawn(BRIGHTNESS), drawn(CONTRAST), drawn(SATURATION)
    turn = (drawn(HUE).flatten() - 1) * math.tau
    yiq = torch.tensor(YIQ)
    rotation = eye.repeat(count, 1, 1)
    rotation[:, 1, 1], rotation[:, 1, 2] = turn.cos(), -turn.sin()
    rotation[:, 2, 1], rotation[:, 2, 2] = turn.sin(), turn.cos()
    hue = yiq.inverse() @ rotation @ yiq
    saturated = saturation * eye + (1 - saturation) * grey
    order = torch.rand(count, 3).argsort(1)
    is_permuted = torch.rand(count, 1) < probability
    channels = eye[torch.where(is_permuted, order, torch.arange(3))]
    return channels @ hue @ saturated * brightness * contrast, (brightness * (1 - contrast)).flatten()


def _recoloured(images: Tensor, matrices: Tensor, added: Tensor) -> Tensor:
    """Images uint8 [B, 3, H, W] times their matrices, with a share of their mean grey added; uint8."""
    matrices, added = (part.to(images.device, non_blocking=True) for part in (matrices, added))
    pixels = images.flatten(2).float()
    mean = torch.tensor(GREY, device=images.device) @ pixels.mean(-1, keepdim=True)  # [B, 1]
    pixels = torch.baddbmm((added * mean[:, 0]).view(-1, 1, 1), matrices, pixels)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).view_as(images)
