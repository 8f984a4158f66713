"""EfficientNet-Lite0 as trained on ImageNet, an independent judge of photos.

Its weights come with an installable package, one of the optional dependencies `pretrained`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from src.common.packaged_weights import PACKAGES, with_names_of

NETWORK = "efficientnet_lite0"  # as timm calls it
PACKAGE = PACKAGES[NETWORK]
SIZE = 224  # pixels a side
IMAGES_AT_ONCE = 32


class ImageNetJudge:
    """The network, on the CPU. It can be had where `PACKAGE.version` is not None."""

    def __init__(self) -> None:
        import timm

        self.network: Any = timm.create_model(NETWORK, pretrained=False)
        tensors = torch.load(PACKAGE.path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(with_names_of(NETWORK, tensors, PACKAGE.path))
        self.network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of images, uint8 [N, 3, H, W]: features fp32 [N, 1280] and ImageNet classes int64 [N]."""
        features, classes = [], []
        for part in images.split(IMAGES_AT_ONCE):
            x = F.interpolate(part.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
            maps = self.network.forward_features(((x - 127) / 128).contiguous(memory_format=torch.channels_last))
            features.append(self.network.forward_head(maps, pre_logits=True))
            classes.append(self.network.forward_head(maps).argmax(1))
        return torch.cat(features), torch.cat(classes)
