"""Images with boxes: their objects by class, their number in an image, and their areas."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from src.describing import MEMBERS, Examined, chosen, class_counts, pixels
from src.describing.digests import digest
from src.describing.kinds.images import flat_images, pictures
from src.describing.stored import StoredSplit

SMALL = 8.0  # pixels a side of a packed image below which a detector hardly finds an object
COLOUR = (213, 94, 0)


class Boxes:
    """How images with boxes are measured and shown."""

    noun, counted = "images", "objects"
    label, has_one_class = "object", False
    fitted: tuple[str, ...] = ()
    titles: Mapping[str, str] = {
        "boxes": "boxes in an image",
        "box area": "area of a box, per cent of the packed image",
        "box shape": "width of a box over its height, as a power of two",
        **pixels.TITLES,
    }

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        measured = pixels.measure(split["images"])
        offsets, boxes, labels = split["offsets"][:], split["boxes"][:], split["labels"][:]
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        _, down, across = meta["shape"]
        owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        annotations = [
            boxes[first:last].tobytes() + labels[first:last].tobytes() for first, last in itertools.pairwise(offsets)
        ]
        members = {name: np.unique(owners[labels == number]) for number, name in enumerate(meta["classes"])}
        return Examined(
            digests=measured.digests,
            numbers={
                "boxes": np.diff(offsets).astype(np.float32),
                "box area": 100 * width * height / np.float32(down * across),
                "box shape": np.log2(np.maximum(width, 1e-3) / np.maximum(height, 1e-3)),
            }
            | measured.features,
            categories={self.label: class_counts(labels, meta["classes"])},
            answers=digest(annotations),
            hashes=measured.hashes,
            pixels=partial(pictures, split["images"]),
            members={name: rows[chosen(len(rows), MEMBERS)] for name, rows in members.items()},
            figures={
                "objects": len(labels),
                "images without an object": int((np.diff(offsets) == 0).sum()),
                f"objects below {SMALL:g} pixels a side": int((np.minimum(width, height) < SMALL).sum()),
                "crowds": int(split["crowd"][:].sum()),
                "difficult objects": int(split["difficult"][:].sum()),
            },
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        """The images with the edges of their boxes."""
        offsets = split["offsets"][:]
        images = [np.array(image) for image in pictures(split["images"], rows)]
        for image, row in zip(images, rows, strict=True):
            height, width = image.shape[:2]
            for box in split["boxes"][offsets[row] : offsets[row + 1]].round().astype(int):
                left, top, right, bottom = np.clip(box, 0, [width - 1, height - 1] * 2)
                image[[top, bottom], left : right + 1] = COLOUR
                image[top : bottom + 1, [left, right]] = COLOUR
        return images

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        lines = flat_images(splits, "contrast", self.noun)
        small = sum(examined.figures[f"objects below {SMALL:g} pixels a side"] for examined in splits.values())
        objects = sum(examined.figures["objects"] for examined in splits.values())
        if small > objects / 10:
            lines.append(
                f"{small:,} of {objects:,} objects are less than {SMALL:g} pixels wide or high once packed; "
                "raise data.size, or they will hardly be found"
            )
        return lines


DESCRIPTION = Boxes()
