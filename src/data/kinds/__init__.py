"""Kinds of data: a file each, holding all that differs between images, texts and pairs.

`src/data/kinds/NAME.py` has a constant `KIND`. Importing it must not import torch: composition asks it for its options,
`src.predict` for its feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from src.configuration.declarations import load_kind
from src.configuration.schema import Loader

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batches

Feed = dict[str, np.ndarray]  # a graph's inputs by name
Examples = np.ndarray | list[str]  # images uint8 [K, H, W, C], or texts


def _same(*inputs: Tensor) -> tuple[Tensor, ...]:
    return inputs


def _joined(feeds: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


@dataclass(frozen=True)
class Inputs:
    """A network's inputs: their names in order, and of each the free dimensions, by axis."""

    names: tuple[str, ...]
    free: tuple[dict[int, str], ...]
    trimmed: Callable[..., tuple[Tensor, ...]] = _same  # part of a batch, cut to the size that it has alone
    joined: Callable[[Sequence[Feed]], Feed] = _joined  # feeds of one example each as one feed


class Kind(Protocol):
    """A kind of data: how its examples are counted, batched, fed to a network and shown."""

    options: type[Loader]  # the keys that `data.loader` takes
    batches: Callable[..., Batches]  # a subclass of Batches, or what makes one, with its arguments
    inputs: Inputs  # what a network takes: the first elements of a batch; the others are labels or targets

    suffixes: tuple[str, ...]  # of the files that a caller's folder is searched for
    example_argument: str  # an input of this kind as typed after `python -m src.predict FOLDER`
    hub_prefix: str  # the hub's word for this kind in the names of tasks, as in image-classification

    def count(self, arrays: Mapping[str, Any]) -> int:
        """The number of examples in a split's arrays."""

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """A caller's input, a path or a text, as a feed of one example; numpy and PIL alone.

        `signature`: a model's signature.json.

        Raises:
            Failure: there is no input, or it can't be read.
        """

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> Examples:
        """Examples of a split as a reader looks at them."""

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        """What `read` needs of a packed data set, as JSON."""

    def snippet(self, signature: Mapping[str, Any]) -> str:
        """Lines of Python that read one example into variables named as the inputs; numpy and PIL alone."""


def load(name: str) -> Kind:
    """The kind of that name.

    Raises:
        ConfigError: there is no such file in src/data/kinds/.
    """
    kind: Kind = load_kind(name)
    return kind
