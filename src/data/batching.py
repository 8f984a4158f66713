"""Batches from memory-mapped tensors: no per-sample `Dataset`, no workers, the same batches every time.

The order of an epoch is a permutation keyed on (seed, epoch), a batch's augmentation is keyed on (seed, epoch, index):
any batch can be made again without those before it, which is what lets a run resume in mid-epoch to the same bits.

What is random is drawn on the CPU, the same for every device, and copied over without waiting; nothing is read back
from the device: a GPU's queue never runs dry.

A split lies on the device if it fits there, else its rows are gathered batch by batch (`data.loader.resident`). Either
way a batch is computed by the same operations on the same device, so its bits are the same.

torch is imported where it computes: composition and `src.predict` import kinds of data, and these this module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from src.configuration.declarations import load_kind
from src.configuration.schema import Loader
from src.data import packed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Batch = tuple[Tensor, ...]
    Share = tuple[Tensor, int]  # the examples of a rank's batch, and the number that keys its augmentation

SHARE = 0.5  # of a GPU's free memory that a split may take to be resident there
MAPPED_DIRECTLY = 2**30  # bytes of a split up to which batches on a CPU come from its map, without reading ahead
EVALUATED = 500  # examples of a batch of evaluation, of up to 64x64 pixels in colour
EVALUATED_VALUES = EVALUATED * 3 * 64 * 64


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
    `batch_size` is the whole batch: each of `world` ranks takes its share of it, and never nothing. The size of
    evaluation batches depends on the configuration and the examples' shape alone, as the last bits of results do.

    Raises:
        PackedError: there are fewer examples than ranks.
    """

    moved: ClassVar[tuple[str, ...] | None] = None  # arrays that are made resident on a GPU; None: all

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
        self.size = loader.batch_size if train else loader.eval_batch_size or evaluation_batch(meta)
        self.epoch = 0
        self.skip = 0  # batches of the epoch that a resumed run has consumed already
        self.every = 1  # of the batches, one in so many is made
        self.frozen = False  # whether every epoch is the first one again
        self.device: torch.device | None = None  # where batches go; None: they stay where the split is
        self.is_resident = True
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
        shares = (
            (indices[self.rank :: self.world], index * self.world + self.rank)
            for index, indices in enumerate(self.order())
            if index >= skip and index % self.every == 0
        )
        yield from self._resident(shares) if self.is_resident else self._gathered(shares)

    def _resident(self, shares: Iterable[Share]) -> Iterator[Batch]:
        """Batches made where the split is."""
        for indices, index in shares:
            yield self.collate(indices, index)

    def _gathered(self, shares: Iterable[Share]) -> Iterator[Batch]:
        """Batches of a split that is not resident on the device."""
        for batch in self._resident(shares):
            yield tuple(part.to(self.device, non_blocking=True) for part in batch)

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
        """Makes batches for a device: moves the split there, unless it is to stay in its file."""
        self.device = device
        moved = self.split.keys() if self.moved is None else self.moved
        self.is_resident = self._fits(device, sum(self.split[key].nbytes for key in moved))
        if self.is_resident:
            self.split = self.split | {key: self.split[key].to(device) for key in moved}
        return self

    def _fits(self, device: torch.device, size: int) -> bool:
        """Whether arrays of `size` bytes become resident on the device; on a CPU, whether batches come from the map."""
        import torch

        if self.loader.resident != "auto":
            return self.loader.resident == "yes"
        if device.type != "cuda":
            return size <= MAPPED_DIRECTLY
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of torch's own pool
        return size <= SHARE * (free + unused)


class RowBatches(Batches):
    """Batches of examples that have a row each in the arrays `rows`, so that a part of them can take the split's place.

    Of a split that is not resident, the next batches' rows are read on a thread. A CPU then makes a batch from the map
    as ever; for a GPU the rows are copied there, and the batch is made from them as others are from the split.
    """

    rows: ClassVar[tuple[str, ...]]

    def collate(self, indices: Tensor, index: int) -> Batch:
        return self.assemble(self.split, indices, indices, index)

    def assemble(self, source: Mapping[str, Tensor], at: Tensor, indices: Tensor, index: int) -> Batch:
        """The batch of the examples `indices`, whose rows lie `at` these positions in the arrays `rows` of `source`."""
        raise NotImplementedError

    def chosen(self, indices: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Which rows of which array a batch takes: int64."""
        return ((key, indices) for key in self.rows)

    def positions(self, indices: Tensor) -> Tensor:
        """Where the examples lie among these rows."""
        import torch

        return torch.arange(len(indices))

    def _gathered(self, shares: Iterable[Share]) -> Iterator[Batch]:
        assert self.device is not None
        shares = list(shares)
        yield from self._on_gpu(self.device, shares) if self.device.type == "cuda" else self._from_map(shares)

    def _from_map(self, shares: Sequence[Share]) -> Iterator[Batch]:
        from src.data.reading_ahead import fetch, read_ahead

        def read(share: Share) -> Share:
            for key, rows in self.chosen(share[0]):
                fetch(self.split[key], rows)
            return share

        for indices, index in read_ahead(read, shares):
            yield self.collate(indices, index)

    def _on_gpu(self, device: torch.device, shares: Sequence[Share]) -> Iterator[Batch]:
        from src.data.reading_ahead import read_ahead, transferred

        parts = transferred(read_ahead(lambda share: self.gather(share[0]), shares), device)
        for rows, (indices, index) in zip(parts, shares, strict=True):
            yield self.assemble(rows, self.positions(indices), indices, index)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Copies of a batch's rows, in page-locked memory."""
        from src.data.reading_ahead import gather

        return {key: gather(self.split[key], rows) for key, rows in self.chosen(indices)}


def evaluation_batch(meta: Mapping[str, Any]) -> int:
    """The examples of an evaluation batch, by their shape: 500, fewer of more than 64x64 pixels in colour."""
    return max(1, min(EVALUATED, EVALUATED_VALUES // math.prod(meta.get("shape", ()))))


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


def spread(batches: Batches, count: int) -> Batches:
    """The same batches, of which an iteration yields about `count`, at equal distances, and makes no others."""
    batches.every = max(1, len(batches) // count)
    return batches


def limited(batches: Batches, limit: int | float | None) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with their examples' indices: the first `limit` of them (a fraction if it is a float), at least one."""
    count = len(batches) if limit is None else round(limit * len(batches)) if isinstance(limit, float) else limit
    yield from zip(batches, batches.order()[: max(1, count)], strict=False)
