"""What a data set holds: statistics, duplicates, drift, and a page that shows them.

`src/describing/kinds/NAME.py` has a constant `DESCRIPTION`: all that differs between kinds of data. A kind without such
a file has a report of counts and duplicates. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from src.describing.stored import StoredSplit

Shown = np.ndarray | str  # a picture uint8 [H, W, 3], or a text


@dataclass(frozen=True)
class Examined:
    """What was measured of the N examples of a split.

    numbers: numeric features by name, float32 [N], or with an entry for each object of the examples.
    categories: how often each value of a categorical feature occurs, in the order of its values.
    digests: of what a network sees of each example, uint64 [N].
    answers: of what it is to answer, uint64 [N]; None: nothing.
    hashes: perceptual hashes of pictures, uint64 [N]; None: the examples are no pictures.
    pixels: gives the pictures of rows, uint8 [H, W, C], whose hashes are alike, so that they can be compared.
    members: rows of examples of each class; of a kind without classes of all examples, under ''.
    figures: further figures by name.
    """

    digests: np.ndarray
    numbers: Mapping[str, np.ndarray]
    categories: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    answers: np.ndarray | None = None
    hashes: np.ndarray | None = None
    pixels: Callable[[Sequence[int]], list[np.ndarray]] | None = None
    members: Mapping[str, np.ndarray] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.digests)


class Description(Protocol):
    """How a kind of data is measured and shown."""

    noun: str  # of an example, in the plural
    label: str  # the categorical feature that is the class; '': there is none
    has_one_class: bool  # whether an example has one class, which is its answer
    counted: str  # what the counts of a class count: examples, objects, entities
    fitted: tuple[str, ...]  # numeric features that packing fits to train, where they are better than elsewhere
    titles: Mapping[str, str]  # numeric features in the order of the page, each with its meaning and unit

    def examine(self, split: StoredSplit, meta: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> Examined:
        """Measures a split in one pass over its arrays.

        `other`: the meta of the data that it will be compared with, whose vocabulary then counts.
        """

    def shown(self, split: StoredSplit, meta: Mapping[str, Any], rows: Sequence[int]) -> list[Shown]:
        """Examples as a reader looks at them."""

    def advice(self, splits: Mapping[str, Examined], meta: Mapping[str, Any]) -> list[str]:
        """Warnings of this kind, a line each: what is wrong, and the remedy."""


def load(kind: str) -> Description:
    """The description of a kind of data; of one without a file in src/describing/kinds/ a plain one."""
    own = f"{__name__}.kinds.{kind}"
    module = own if importlib.util.find_spec(own) is not None else f"{__name__}.kinds.plain"
    description: Description = importlib.import_module(module).DESCRIPTION
    return description


def chosen(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices at equal distances, int64."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64) if count else np.empty(0, np.int64)


def class_members(labels: np.ndarray, classes: Sequence[str], most: int) -> dict[str, np.ndarray]:
    """At most `most` rows of each class, at equal distances; labels int [N]."""
    order = np.argsort(labels, kind="stable")
    borders = np.searchsorted(labels[order], np.arange(len(classes) + 1))
    return {
        name: order[first : first + size][chosen(size, most)]
        for name, first, size in zip(classes, borders, np.diff(borders), strict=False)
    }


def reference(description: Description, splits: Mapping[str, Examined]) -> Examined:
    """What other examples are compared with: train; features that are fitted to it as they are in val."""
    fitted = {name: splits["val"].numbers[name] for name in description.fitted}
    return replace(splits["train"], numbers={**splits["train"].numbers, **fitted})


def joined(splits: Iterable[Examined]) -> Examined:
    """The examples of several splits together, as far as they are compared."""
    parts = list(splits)
    numbers = dict.fromkeys(name for part in parts for name in part.numbers)
    categories = dict.fromkeys(name for part in parts for name in part.categories)
    return Examined(
        digests=np.concatenate([part.digests for part in parts]),
        numbers={n: np.concatenate([part.numbers[n] for part in parts if n in part.numbers]) for n in numbers},
        categories={
            name: dict(sum((Counter(part.categories.get(name, {})) for part in parts), Counter()))
            for name in categories
        },
    )


def class_counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """How often each class occurs among labels, int [N]."""
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


MEMBERS = 8  # examples of a class that are shown
