"""Test-time augmentation: a classifier's logits, averaged over several views of the same pictures."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def averaged_logits(model: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Logits of uint8 [B, C, H, W], averaged over views.

    Args:
        model: maps uint8 [B, C, H, W] to logits [B, classes].
        images: the pictures.
        tta: `none`: the picture itself. `mirror`: also its mirror image. `six_views`: these two, and half of the
            weight for both, moved by a pixel up and left, and down and right (Keller Jordan's airbench).
    """
    if tta == "none":
        return model(images)
    both = (model(images) + model(images.flip(-1))) / 2
    if tta == "mirror":
        return both
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").to(images.dtype)
    moved = [padded[..., :height, :width], padded[..., 2 : 2 + height, 2 : 2 + width]]
    return (both + sum(averaged_logits(model, picture, "mirror") for picture in moved) / 2) / 2
