"""Pairs of images: `input` and `target` uint8 [N, 3, S, S]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from src.configuration.schema import Loader
from src.data.batching import RowBatches, generator
from src.data.image_files import SUFFIXES
from src.data.kinds import Feed, Inputs
from src.data.kinds.images import image_snippet, read_image

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batch


class PairLoader(Loader):
    """Batches of pairs and their jitter, the same for both images of a pair."""

    flip: Literal["none", "random"] = Field(default="none", description="random: half of the pairs are mirrored")
    enlarge: float = Field(default=1.0, ge=1, le=4, description="factor, before a random crop of the old size")


class PairBatches(RowBatches):
    """(input uint8 [B, 3, S, S], target uint8 [B, 3, S, S])."""

    loader: PairLoader
    rows = ("input", "target")

    def assemble(self, source: Mapping[str, Tensor], at: Tensor, indices: Tensor, index: int) -> Batch:
        from src.data import augmentation

        on_device = at.to(source["input"].device, non_blocking=True)
        pair = source["input"][on_device], source["target"][on_device]
        if not self.train:
            return pair
        random = generator(self.seed, "jitter", self.epoch, index)
        return augmentation.jitter_pair(
            *pair, enlarge=self.loader.enlarge, flip=self.loader.flip == "random", random=random
        )


class Pairs:
    """The kind of paired images: a network draws the second from the first."""

    options = PairLoader
    batches = PairBatches
    inputs = Inputs(("image",), ({0: "batch"},))
    suffixes = SUFFIXES
    example_argument = "input.png"
    hub_prefix = "image"

    def count(self, arrays: Mapping[str, Any]) -> int:
        return len(arrays["input"])

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """An image file as `image` uint8 [1, 3, S, S], resized to the model's size."""
        return {"image": read_image(source, signature)}

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> np.ndarray:
        """The inputs."""
        return split["input"][indices].permute(0, 2, 3, 1).cpu().numpy()

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        return {key: meta[key] for key in ("shape", "background") if key in meta}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return image_snippet(signature)


KIND = Pairs()
