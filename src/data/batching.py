"""Batches from tensors in memory: no per-sample `Dataset`, no workers, the same batches every time.

The order of an epoch is a permutation keyed on (seed, epoch), a batch's augmentation is keyed on (seed, epoch, index):
any batch can be made again without those before it, which is what lets a run resume in mid-epoch to the same bits.

What is random is drawn on the CPU, the same for every device, and copied over without waiting; nothing is read back
from the device: a GPU's queue never runs dry.

torch is imported where it computes: composition and `src.predict` import kinds of data, and these this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from src.configuration.declarations import load_kind
from src.configuration.schema import Loader
from src.data import packed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Batch = tuple[Tensor, ...]


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose numbers depend on `key` alone."""
    import torch

    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class BatchSource(Protocol):
    """Batches to be iterated over, and how many they are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Batches:
    """An iterable over one split, sized and re-iterable as Lightning wants it.

    Training batches are shuffled, augmented and of full size; evaluation batches cover the split in a fixed order.
    `batch_size` is the whole batch: each of `world` ranks takes its share of it, and never nothing.

    Raises:
        PackedError: there are fewer examples than ranks.
    """

    def __init__(
        self,
        split: dict[str, Tensor],
        meta: dict[str, Any],
        loader: Loader,
        *,
        train: bool,
        seed: int = 0,
        epochs: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.count = load_kind(meta["kind"]).count(split)  # of two unpaired parts, the kind says which one counts
        if self.count < world:
            raise packed.PackedError(f"{self.count} examples can't be shared out among {world} processes")
        self.split = split
        self.meta = meta
        self.loader = loader
        self.train = train
        self.seed = seed
        self.epochs = epochs  # of the whole run, for what changes on its way
        self.rank = rank
        self.world = world
        self.size = loader.batch_size if train else loader.eval_batch_size
        self.epoch = 0
        self.skip = 0  # batches of the epoch that a resumed run has consumed already
        self.frozen = False  # whether every epoch is the first one again
        # Lightning calls `set_epoch` of a loader's `batch_sampler.sampler` before it asks for the epoch's iterator.
        self.batch_sampler = SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that epoch's."""
        if epoch != self.epoch and not self.frozen:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        if self.train:
            return max(1, self.count // self.size)
        batches, remainder = -(-self.count // self.size), self.count % self.size
        # A last batch smaller than the number of ranks is merged into the one before.
        is_merged = 0 < remainder < self.world and self.count > self.size
        return batches - 1 if is_merged else batches

    def __iter__(self) -> Iterator[Batch]:
        skip, self.skip = self.skip, 0
        for index, indices in enumerate(self.order()):
            if index >= skip:
                yield self.collate(indices[self.rank :: self.world], index * self.world + self.rank)

    def order(self) -> list[Tensor]:
        """The examples of each batch of this epoch, as index tensors."""
        import torch

        if not self.train:
            return self._cut(torch.arange(self.count))
        order = torch.randperm(self.count, generator=generator(self.seed, "order", self.epoch))
        return list(order.split(self.size))[: len(self)]

    def _cut(self, examples: Tensor) -> list[Tensor]:
        """Evaluation batches: all of full size, but for the last one."""
        return list(examples.tensor_split(tuple(range(self.size, len(self) * self.size, self.size))))

    def collate(self, indices: Tensor, index: int) -> Batch:
        """The batch of these examples; `index` keys its augmentation, another one for each rank."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Batches:
        """Moves the split to a device, so that batches are made there."""
        self.split = {key: value.to(device) for key, value in self.split.items()}
        return self


def batches(folder: Path, split: str, loader: Loader, **options: Any) -> Batches:
    """Batches over a packed split, by the kind that its meta.json names; `options` as for `Batches`.

    Raises:
        PackedError: the split is missing or damaged.
    """
    meta = packed.read_meta(folder)
    batches_of_kind: Batches = load_kind(meta["kind"]).batches(
        packed.read_split(folder, split), meta, loader, **options
    )
    return batches_of_kind


def limited(batches: Batches, limit: int | float | None) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with their examples' indices: the first `limit` of them (a fraction if it is a float), at least one."""
    count = len(batches) if limit is None else round(limit * len(batches)) if isinstance(limit, float) else limit
    yield from zip(batches, batches.order()[: max(1, count)], strict=False)
