"""Labelled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from src.describing import MEMBERS, Examined, class_counts, class_members, pixels
from src.describing.stored import StoredArray, StoredSplit

FLAT = 2.0  # contrast below which an image is of one colour to the eye


class Images:
    """How labelled images are measured and shown."""

    noun = counted = "images"
    label, has_one_class = "class", True
    fitted: tuple[str, ...] = ()
    titles = pixels.TITLES

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        measured = pixels.measure(split["images"])
        labels = split["labels"][:]
        return Examined(
            digests=measured.digests,
            numbers=measured.features,
            categories={self.label: class_counts(labels, meta["classes"])},
            answers=labels.astype(np.uint64),
            hashes=measured.hashes,
            pixels=partial(pictures, split["images"]),
            members=class_members(labels, meta["classes"], MEMBERS),
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        return pictures(split["images"], rows)

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        return flat_images(splits, "contrast", self.noun)


def pictures(images: StoredArray, rows: Sequence[int]) -> list[np.ndarray]:
    """Images uint8 [N, C, H, W] as pictures uint8 [H, W, 3]."""
    chosen = images[np.asarray(rows, np.int64)].transpose(0, 2, 3, 1)
    return list(np.broadcast_to(chosen, (*chosen.shape[:3], 3)))


def flat_images(splits: Mapping[str, Examined], contrast: str, noun: str) -> list[str]:
    """A warning of images without any contrast."""
    counts = {split: int((examined.numbers[contrast] < FLAT).sum()) for split, examined in splits.items()}
    where = ", ".join(f"{count} of {split}" for split, count in counts.items() if count)
    return [f"{where}: {noun} of a single colour; look whether their files are blank or damaged"] if where else []


DESCRIPTION = Images()
