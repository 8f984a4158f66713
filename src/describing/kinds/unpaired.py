"""Images of two domains without pairs: the examples are those of `a` and, after them, those of `b`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from src.describing import MEMBERS, Examined, chosen, pixels
from src.describing.kinds.images import flat_images, pictures
from src.describing.stored import StoredSplit

DOMAINS = ("a", "b")


class Unpaired:
    """How images of two domains are measured and shown."""

    noun = counted = "images"
    label, has_one_class = "domain", True
    fitted: tuple[str, ...] = ()
    titles: Mapping[str, str] = {
        f"{domain} {name}": f"{domain}: {title}" for domain in DOMAINS for name, title in pixels.TITLES.items()
    }

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        first, second = (pixels.measure(split[domain]) for domain in DOMAINS)
        sizes = len(first.digests), len(second.digests)
        return Examined(
            digests=np.concatenate([first.digests, second.digests]),
            numbers={
                f"{domain} {name}": values
                for domain, measured in zip(DOMAINS, (first, second), strict=True)
                for name, values in measured.features.items()
            },
            categories={self.label: dict(zip(DOMAINS, sizes, strict=True))},
            answers=np.repeat(np.arange(2, dtype=np.uint64), sizes),
            hashes=np.concatenate([first.hashes, second.hashes]),
            pixels=partial(self.shown, split, meta),
            members={"a": chosen(sizes[0], MEMBERS), "b": sizes[0] + chosen(sizes[1], MEMBERS)},
        )

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
        border = len(split["a"])
        return [
            pictures(split["a" if row < border else "b"], [row if row < border else row - border])[0] for row in rows
        ]

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        return [line for domain in DOMAINS for line in flat_images(splits, f"{domain} contrast", f"images of {domain}")]


DESCRIPTION = Unpaired()
