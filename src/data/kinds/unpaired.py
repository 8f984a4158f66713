"""Images of two domains without pairs: `a` uint8 [N, 3, H, W] and `b` uint8 [M, 3, H, W].

Training images may be larger than those that a network sees, the meta's `shape`: batches are random crops of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from src.configuration.schema import Loader
from src.data.batching import RowBatches, generator
from src.data.image_files import SUFFIXES
from src.data.kinds import Feed, Inputs
from src.data.kinds.images import image_snippet, read_image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from src.data.batching import Batch

ABSENT = -1  # index of the shorter domain where it has no further image


class UnpairedLoader(Loader):
    """Batches of images of two domains; each domain is cropped and mirrored on its own."""

    flip: Literal["none", "random"] = Field(default="none", description="random: half of the images are mirrored")


class UnpairedBatches(RowBatches):
    """(a uint8 [B, 3, S, S], b uint8 [B, 3, S, S]).

    An epoch has as many examples as the longer domain; the shorter one begins again, in another order, as often as
    needed. A batch of evaluation holds each image once, so that it may have fewer of the shorter domain, also none.
    """

    rows = ("a", "b")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.domains = {name: len(self.split[name]) for name in ("a", "b")}

    def order(self) -> list[Tensor]:
        """The examples of each batch: int64 [B, 2], indices into `a` and `b`."""
        import torch

        if not self.train:
            return self._cut(torch.stack([self._spread(length) for length in self.domains.values()], 1))
        order = torch.stack([self._shuffled(name, length) for name, length in self.domains.items()], 1)
        return list(order.split(self.size))[: len(self)]

    def _shuffled(self, domain: str, length: int) -> Tensor:
        """An order of the domain, int64 [count]: permutations one after the other."""
        import torch

        rounds = [
            torch.randperm(length, generator=generator(self.seed, "order", self.epoch, domain, number))
            for number in range(-(-self.count // length))
        ]
        return torch.cat(rounds)[: self.count]

    def _spread(self, length: int) -> Tensor:
        """The domain's indices at equal distances: int64 [count], ABSENT between them."""
        import torch

        positions = torch.arange(self.count) * length
        return torch.where(positions % self.count < length, positions // self.count, ABSENT)

    def chosen(self, indices: Tensor) -> Iterator[tuple[str, Tensor]]:
        columns = zip(self.domains, indices.unbind(1), strict=True)
        return ((domain, column[column != ABSENT]) for domain, column in columns)

    def positions(self, indices: Tensor) -> Tensor:
        is_present = indices != ABSENT
        return (is_present.cumsum(0) - 1).where(is_present, ABSENT)

    def assemble(self, source: Mapping[str, Tensor], at: Tensor, indices: Tensor, index: int) -> Batch:
        return tuple(
            self._images(domain, source[domain], column[column != ABSENT], index)
            for domain, column in zip(self.domains, at.unbind(1), strict=True)
        )

    def _images(self, domain: str, images: Tensor, chosen: Tensor, index: int) -> Tensor:
        """The images of one domain: random crops in training, perhaps mirrored, else the middles."""
        size = self.meta["shape"][1:]
        if not self.train:
            top, left = ((whole - part) // 2 for whole, part in zip(images.shape[2:], size, strict=True))
            middles = images[..., top : top + size[0], left : left + size[1]]
            return middles[chosen.to(images.device, non_blocking=True)]
        random = generator(self.seed, "crop", self.epoch, index, domain)
        is_mirrored = self.loader.flip == "random"  # type: ignore[attr-defined]
        return crops(images, chosen, size, is_mirrored, random)


def crops(images: Tensor, chosen: Tensor, size: list[int], flip: bool, random: torch.Generator) -> Tensor:
    """Random crops, half of them mirrored if `flip`.

    Args:
        images: uint8 [N, C, H, W].
        chosen: int64 [B], on the CPU.
        size: height and width of a crop, at most H and W.
        flip: whether crops are mirrored at random.
        random: a CPU generator.

    Returns:
        uint8 [B, C, *size].
    """
    import torch

    from src.data.augmentation import pixels_at

    count, device = len(chosen), images.device
    rows, columns = (
        torch.randint(whole - part + 1, (count, 1), generator=random) + torch.arange(part)
        for whole, part in zip(images.shape[2:], size, strict=True)
    )
    if flip:
        mirrored = torch.rand(count, 1, generator=random) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    chosen, rows, columns = (part.to(device, non_blocking=True) for part in (chosen, rows, columns))
    return pixels_at(images, chosen, rows, columns)


class Unpaired:
    """The kind of unpaired domains: a network turns an image of either domain into one of the other."""

    options = UnpairedLoader
    batches = UnpairedBatches
    inputs = Inputs(("image",), ({0: "batch"},))
    suffixes = SUFFIXES
    example_argument = "input.png"
    hub_prefix = "image"

    def count(self, arrays: Mapping[str, Any]) -> int:
        """The images of the longer domain; 0 if a domain is empty."""
        lengths = len(arrays["a"]), len(arrays["b"])
        return max(lengths) if min(lengths) else 0

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """An image file as `image` uint8 [1, 3, S, S], resized to the model's size."""
        return {"image": read_image(source, signature)}

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> np.ndarray:
        """Images of the first domain."""
        return split["a"][indices].permute(0, 2, 3, 1).cpu().numpy()

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        return {key: meta[key] for key in ("shape", "background") if key in meta}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return image_snippet(signature)


KIND = Unpaired()
