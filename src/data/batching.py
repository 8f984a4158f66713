"""Batches from tensors in memory: no per-sample `Dataset`, no workers, the same batches every time.

The order of an epoch is a permutation keyed on (seed, epoch), a batch's augmentation is keyed on (seed, epoch, index):
any batch can be made again without those before it, which is what lets a run resume in mid-epoch to the same bits.

What is random is drawn on the CPU, the same for every device, and copied over without waiting; nothing is read back
from the device: a GPU's queue never runs dry.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from src.common.errors import Failure
from src.common.hardware import release_freed_memory
from src.configuration.schema import Loader
from src.data import augmentation, packed

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

Batch = tuple[Tensor, ...]


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose numbers depend on `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


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
        if packed.examples(split) < world:
            raise packed.PackedError(f"{packed.examples(split)} examples can't be shared out among {world} processes")
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
        count = packed.examples(self.split)
        if self.train:
            return max(1, count // self.size)
        # Fewer examples than ranks are no batch of their own: the one before takes them.
        return -(-count // self.size) - (0 < count % self.size < self.world and count > self.size)

    def __iter__(self) -> Iterator[Batch]:
        skip, self.skip = self.skip, 0
        for index, chosen in enumerate(self.order()):
            if index >= skip:
                yield self.collate(chosen[self.rank :: self.world], index * self.world + self.rank)

    def order(self) -> list[Tensor]:
        """The examples of each batch of this epoch, as index tensors."""
        count = packed.examples(self.split)
        if not self.train:
            return self._cut(torch.arange(count))
        return list(torch.randperm(count, generator=generator(self.seed, "order", self.epoch)).split(self.size))[
            : len(self)
        ]

    def _cut(self, examples: Tensor) -> list[Tensor]:
        """Evaluation batches: all of full size, but for the last one."""
        return list(examples.tensor_split(tuple(range(self.size, len(self) * self.size, self.size))))

    def collate(self, chosen: Tensor, index: int) -> Batch:
        """The batch of these examples; `index` keys its augmentation, another one for each rank."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Batches:
        """Moves the split to a device, so that batches are made there."""
        self.split = {key: value.to(device) for key, value in self.split.items()}
        return self


class ImageBatches(Batches):
    """(images uint8 [B, C, H, W], labels int64 [B]).

    Raises:
        Failure: there is more crop padding than the images have pixels.
    """

    def __init__(self, split: dict[str, Tensor], meta: dict[str, Any], loader: Loader, **how: Any) -> None:
        super().__init__(split, meta, loader, **how)
        height, width = split["images"].shape[2:]
        if loader.crop_padding >= min(height, width):  # there would be too few pixels to reflect
            raise Failure(
                f"data.loader.crop_padding: {loader.crop_padding}, but the images are {height}x{width}; "
                f"give at most {min(height, width) - 1}"
            )

    @property
    def _low_resolution(self) -> int:
        """The size that this epoch's images are brought to; 0: they keep their own."""
        low = self.loader.low_resolution
        return low.size if self.train and low and self.epoch < round(low.until * self.epochs) else 0

    def set_epoch(self, epoch: int) -> None:
        before = self._low_resolution
        super().set_epoch(epoch)
        if self._low_resolution != before:
            release_freed_memory()

    def collate(self, chosen: Tensor, index: int) -> Batch:
        images, labels = self.split["images"], self.split["labels"]
        there = chosen.to(images.device, non_blocking=True)
        if not self.train:
            return images[there], labels[there]
        mirrored = None
        if self.loader.flip == "alternating":
            # Keller Jordan's airbench: mirrored at random in epoch 0, then each image the other way round every epoch.
            mirrored = self._mirrored_first[chosen] ^ bool(self.epoch % 2)
        elif self.loader.flip == "random":
            mirrored = torch.rand(len(chosen), generator=generator(self.seed, "flip", self.epoch, index)) < 0.5
        if mirrored is not None:
            mirrored = mirrored.to(images.device, non_blocking=True)
        random = generator(self.seed, "crop", self.epoch, index)
        made = augmentation.crop_and_flip(images, there, self.loader.crop_padding, mirrored, random)
        if self.loader.rotation:
            made = augmentation.rotate(made, self.loader.rotation, generator(self.seed, "rotation", self.epoch, index))
        if size := self._low_resolution:
            made = augmentation.shrink(made, size)
        return made, labels[there]

    @cached_property
    def _mirrored_first(self) -> Tensor:
        """Which images of the split are mirrored in epoch 0: bool [N], on the CPU."""
        return torch.rand(len(self.split["images"]), generator=generator(self.seed, "flip")) < 0.5


class PairBatches(Batches):
    """(input uint8 [B, 3, S, S], target uint8 [B, 3, S, S])."""

    def collate(self, chosen: Tensor, index: int) -> Batch:
        chosen = chosen.to(self.split["input"].device, non_blocking=True)
        pair = self.split["input"][chosen], self.split["target"][chosen]
        if not self.train:
            return pair
        random = generator(self.seed, "jitter", self.epoch, index)
        return augmentation.jitter_pair(
            *pair, enlarge=self.loader.enlarge, flip=self.loader.flip != "none", random=random
        )


class TextBatches(Batches):
    """(tokens int64 [B, T], lengths int64 [B], labels int64 [B]), T the longest of the batch.

    Batches hold texts of like length: a fresh permutation is cut into stretches of 50 batches, each sorted by length.
    """

    STRETCH = 50

    def order(self) -> list[Tensor]:
        lengths = self.split["offsets"].diff()
        if not self.train:
            return self._cut(lengths.argsort(stable=True))
        random = generator(self.seed, "order", self.epoch)
        shuffled = torch.randperm(len(lengths), generator=random)[: len(self) * self.size]
        stretches = shuffled.split(self.STRETCH * self.size)
        batches = [batch for s in stretches for batch in s[lengths[s].argsort(stable=True)].split(self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=random)]

    def collate(self, chosen: Tensor, index: int) -> Batch:
        offsets, flat = self.split["offsets"], self.split["tokens"]
        start, whole = offsets[chosen], offsets[chosen + 1] - offsets[chosen]
        longest = min(int(whole.max()), self.loader.max_tokens or sys.maxsize)
        chosen, start, whole = (values.to(flat.device, non_blocking=True) for values in (chosen, start, whole))
        lengths = whole.clamp(max=longest)
        place = torch.arange(longest, device=flat.device)[None, :]
        # Of a text that is too long the head and the tail stay.
        source = torch.where(place < (lengths[:, None] + 1) // 2, place, place + (whole - lengths)[:, None])
        inside = place < lengths[:, None]
        tokens = flat[torch.where(inside, start[:, None] + source, 0)].long()
        if self.train and self.loader.word_dropout:
            random = generator(self.seed, "words", self.epoch, index)
            dropped = torch.rand(tokens.shape, generator=random) < self.loader.word_dropout
            dropped = dropped.to(flat.device, non_blocking=True)
            tokens = tokens.masked_fill(dropped, self.meta["vocabulary"].index(packed.UNKNOWN))
        return (
            tokens.masked_fill(~inside, self.meta["vocabulary"].index(packed.PADDING)),
            lengths,
            self.split["labels"][chosen],
        )

    def to(self, device: torch.device) -> Batches:
        """Moves the split, but for the offsets: the CPU needs a batch's lengths to know the batch's shape."""
        offsets = self.split["offsets"]
        super().to(device)
        self.split["offsets"] = offsets
        return self


KINDS: dict[str, type[Batches]] = {"images": ImageBatches, "text": TextBatches, "pairs": PairBatches}


def batches(folder: Path, split: str, loader: Loader, **how: Any) -> Batches:
    """Batches over a packed split.

    Raises:
        PackedError: the split is missing or damaged.
    """
    meta = packed.read_meta(folder)
    return KINDS[meta["kind"]](packed.read_split(folder, split), meta, loader, **how)


class PackedData(LightningDataModule):
    """The packed train and val splits for a trainer, resident on its device.

    Its state is how far the epoch has gone, so that a checkpoint taken in mid-epoch resumes with the batch that was
    next.
    """

    def __init__(self, folder: Path, loader: Loader, seed: int, *, same_batches: bool = False) -> None:
        super().__init__()
        self.folder = folder
        self.loader = loader
        self.seed = seed
        self.same_batches = same_batches  # every epoch is epoch 0 again: a network must be able to learn it by heart
        self.position = (0, 0)  # epoch, batches consumed of it

    def train_dataloader(self) -> Batches:
        made = self._batches("train", train=True)
        made.epoch, made.skip = self.position
        made.frozen = self.same_batches
        return made

    def val_dataloader(self) -> Batches:
        return self._batches("val", train=False)

    def _batches(self, split: str, train: bool) -> Batches:
        trainer: Trainer = self.trainer  # type: ignore[assignment]
        made = batches(
            self.folder,
            split,
            self.loader,
            train=train,
            seed=self.seed,
            epochs=trainer.max_epochs or 0,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return made.to(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        trainer: Trainer = self.trainer  # type: ignore[assignment]
        # Not `completed`, which Lightning counts after the hooks of a batch's end, where checkpoints are taken.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        consumed = progress.processed
        done = consumed == trainer.num_training_batches
        return {"epoch": trainer.current_epoch + done, "consumed": 0 if done else consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = (state_dict["epoch"], state_dict["consumed"])
