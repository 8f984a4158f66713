"""Augmentation of images with boxes by torchvision's v2 transforms, as SSD is trained (Liu et al., 2016, section 2.2)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from src.data.kinds.boxes import MARGIN, NO_BOX

if TYPE_CHECKING:
    from src.data.kinds.boxes import BoxLoader

SMALLEST = 1.0  # pixels; a box whose visible part has a smaller side is dropped


@functools.lru_cache(maxsize=8)
def _transforms(loader: BoxLoader) -> tuple[list[Any], list[Any]]:
    """The transforms of any image, and those of an image with a box."""
    general: list[Any] = []
    if loader.photometric:
        general.append(v2.RandomPhotometricDistort(p=loader.photometric))
    if loader.zoom_out:
        zoom = v2.RandomZoomOut(fill=MARGIN, side_range=(1.0, loader.zoom_largest), p=loader.zoom_out)
        general.append(zoom)
    with_box: list[Any] = []
    if loader.iou_crop:
        with_box.append(v2.RandomApply([v2.RandomIoUCrop(min_scale=loader.crop_smallest)], p=loader.iou_crop))
    return general, with_box


def augment(
    images: Tensor, boxes: Tensor, labels: Tensor, ignored: Tensor, loader: BoxLoader, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch with changed colours, zoomed out, cropped and mirrored, in its old size.

    Args:
        images: uint8 [B, 3, H, W].
        boxes: fp32 [B, M, 4], xyxy in pixels, on the CPU.
        labels: int64 [B, M], -1 where there is no box.
        ignored: bool [B, M].
        random: keys all that is drawn; the global generator, which the transforms use, is left as it was.

    Returns:
        The same four; a box that a crop has cut off is gone.
    """
    general, with_box = _transforms(loader)
    size = list(images.shape[-2:])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random.initial_seed())
        mirrored = torch.rand(len(images)) < 0.5 if loader.flip == "random" else torch.zeros(len(images), dtype=bool)
        if general or with_box:
            new_images = []
            boxes, labels, ignored = boxes.clone(), labels.clone(), ignored.clone()
            for row, image in enumerate(images):
                count = int((labels[row] != NO_BOX).sum())
                picture: Any = tv_tensors.Image(image)
                framed: Any = tv_tensors.BoundingBoxes(boxes[row, :count], format="XYXY", canvas_size=image.shape[-2:])
                for transform in [*general, *(with_box if count else [])]:
                    picture, framed = transform(picture, framed)
                if list(picture.shape[-2:]) != size:
                    picture, framed = (v2.functional.resize(part, size, antialias=True) for part in (picture, framed))
                new_images.append(picture.as_subclass(Tensor))
                visible = v2.functional.clamp_bounding_boxes(framed).as_subclass(Tensor)
                is_kept = ((visible[:, 2:] - visible[:, :2]) >= SMALLEST).all(1)
                kept = int(is_kept.sum())
                for part, values in ((boxes, visible), (labels, labels[row, :count]), (ignored, ignored[row, :count])):
                    values = values[is_kept]
                    part[row] = NO_BOX if part is labels else 0
                    part[row, :kept] = values
            images = torch.stack(new_images)
    if mirrored.any():
        images = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device, non_blocking=True), images.flip(-1), images)
        left, top, right, bottom = boxes.unbind(-1)
        turned = torch.stack([size[1] - right, top, size[1] - left, bottom], -1)
        is_turned = mirrored[:, None, None] & (labels != NO_BOX)[..., None]
        boxes = torch.where(is_turned, turned, boxes)
    return images, boxes, labels, ignored
