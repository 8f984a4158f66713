"""Pairs of images: duplicates are pairs of equal inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from src.describing import MEMBERS, Examined, chosen, pixels
from src.describing.kinds.images import flat_images, pictures
from src.describing.stored import StoredSplit

SIDES = ("input", "target")


class Pairs:
    """How pairs of images are measured and shown."""

    noun = counted = "pairs"
    label, has_one_class = "", False
    fitted: tuple[str, ...] = ()
    titles: Mapping[str, str] = {
        f"{side} {name}": f"{side}: {title}" for side in SIDES for name, title in pixels.TITLES.items()
    }

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        sides = {side: pixels.measure(split[side]) for side in SIDES}
        numbers = {f"{side} {name}": v for side, measured in sides.items() for name, v in measured.features.items()}
        return Examined(
            digests=sides["input"].digests,
            numbers=numbers,
            answers=sides["target"].digests,
            hashes=sides["input"].hashes,
            pixels=partial(pictures, split["input"]),
            members={"": chosen(len(split["input"]), MEMBERS)},
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        """The two images side by side."""
        sides = zip(*(pictures(split[side], rows) for side in SIDES), strict=True)
        return [np.concatenate(pair, axis=1) for pair in sides]

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        return [line for side in SIDES for line in flat_images(splits, f"{side} contrast", f"{side} images")]


DESCRIPTION = Pairs()
