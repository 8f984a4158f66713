"""Photos in class folders: a training epoch against torchvision's `ImageFolder` and a `DataLoader` with two workers.

Both train the same network on the same JPEGs of 300x256, brought to the same size, with the same crops and flips. Here
they are decoded once, when they are packed; there in every epoch.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import stock
from benchmarks.setting import Setting
from benchmarks.table import Figure
from benchmarks.timing import paired
from benchmarks.training import Loops
from src.common.hardware import keep_freed_memory
from src.configuration.composing import compose
from src.configuration.schema import Config
from src.data.batching import Batches
from src.data.packing import pack_splits
from src.training import determinism

CLASSES = 8
PHOTO = (300, 256)  # width and height of a JPEG
NETWORKS = {
    "ResNet-18": ("model=resnet18",),
    "small network": ("model=cnn", "model.network.widths=[8,16,16,16]", "model.network.hidden=[16]"),
}


class EpochTimer(pl.Callback):
    """Times the one epoch of a training, the start of its `DataLoader` included."""

    def on_train_start(self, *arguments: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *arguments: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def measure(setting: Setting) -> list[Figure]:
    """Images per second of an epoch, with two networks and without one."""
    return measure_at(setting, size=224, count=320, batch=32)


def measure_at(setting: Setting, *, size: int, count: int, batch: int) -> list[Figure]:
    """The figures with `count` training photos, brought to `size` x `size`, in batches of `batch`."""
    keep_freed_memory()
    photos = setting.folder / "photos"
    write_photos(photos, count)
    figures: list[Figure] = []
    for name, overrides in NETWORKS.items():
        config = configure(setting, size, batch, overrides)
        started = time.perf_counter()
        if not config.processed.exists():
            pack(config, photos)
            seconds = time.perf_counter() - started
            figures.append(Figure.single("class folders", "packing, once", count / seconds, "images/s"))
        figures += compare(f"class folders, {name}", config, photos, setting)
    return [*figures, *compare_loaders(config, photos, setting)]


def compare(label: str, config: Config, photos: Path, setting: Setting) -> list[Figure]:
    """An epoch of `trainer.fit` on the packed photos, and one of ordinary code on the JPEGs."""
    determinism.fix(config.seed, config.trainer.threads)
    loops = Loops(config, setting.folder / "work")
    steps = len(loops.batches())

    def packed_epoch() -> float:
        timer = EpochTimer()
        loops.fit(steps, timer)
        return timer.seconds

    def folder_epoch() -> float:
        torch.use_deterministic_algorithms(False)
        timer = EpochTimer()
        with warnings.catch_warnings(action="ignore"):
            stock.classify(config, loops.meta, image_folder(photos, config, loops.meta), loops.device, timer, steps)
        return timer.seconds

    return rates(
        label, {"packed": packed_epoch, "ImageFolder": folder_epoch}, steps * config.loader.batch_size, setting
    )


def compare_loaders(config: Config, photos: Path, setting: Setting) -> list[Figure]:
    """The same without a network: what either delivers to one that takes no time."""
    loops = Loops(config, setting.folder / "work")
    size, steps = config.loader.batch_size, len(loops.batches())

    def drained(batches: Any) -> float:
        start = time.perf_counter()
        for _ in islice(batches, steps):
            pass
        return time.perf_counter() - start

    def folder_epoch() -> float:
        images = image_folder(photos, config, loops.meta)
        return drained(DataLoader(images, size, shuffle=True, drop_last=True, num_workers=stock.WORKERS))

    def packed_epoch() -> float:
        return drained(ahead(loops.batches()))

    candidates = {"packed": packed_epoch, "ImageFolder": folder_epoch}
    return rates("class folders, no network", candidates, steps * size, setting)


def ahead(batches: Batches) -> Batches:
    """The batches, their rows read ahead as those of a split larger than memory are."""
    batches.is_resident = False
    return batches


def rates(label: str, candidates: dict[str, Any], images: int, setting: Setting) -> list[Figure]:
    """Images per second of either, and how many times as fast the packed photos are."""
    rounds = paired(candidates, setting.rounds)

    def rate(seconds: float) -> float:
        return images / seconds

    return [
        *(Figure(label, name, rounds.spread(name, rate), "images/s") for name in candidates),
        Figure(label, "speed on packed photos / ImageFolder", rounds.ratio("ImageFolder", "packed"), "x"),
    ]


def write_photos(folder: Path, count: int) -> None:
    """Smooth coloured noise as JPEGs of about 12 kB: `count` to train on, and one of each class to test."""
    random = np.random.default_rng(0)
    for split, number in (("train", count), ("test", CLASSES)):
        for index in range(number):
            small = Image.fromarray(random.integers(0, 256, (24, 28, 3), np.uint8))
            path = folder / split / f"class{index % CLASSES}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small.resize(PHOTO, Image.Resampling.BICUBIC).save(path, quality=80)


def configure(setting: Setting, size: int, batch: int, overrides: tuple[str, ...]) -> Config:
    """The experiment's configuration on photos in class folders."""
    data = [
        "data._target_=src.data.sets.image_folder.ImageFolders",
        "data.name=photos",
        "data.official=null",
        f"+data.size={size}",
        f"data.loader.batch_size={batch}",
        "data.loader.low_resolution=null",
        "data.loader.flip=random",
    ]
    return compose([*setting.arguments("cifar10_resnet"), *overrides, *data])


def pack(config: Config, photos: Path) -> None:
    """Packs an archive of the photos, as `preprocess` does."""
    archive = photos.with_suffix(".tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(photos, ".")
    with contextlib.redirect_stdout(io.StringIO()):  # the counts
        pack_splits(config, archive, {"origin": "generated", "sha256": ""})


def image_folder(photos: Path, config: Config, meta: Any) -> Any:
    """torchvision's data set of the training photos, with the experiment's augmentation."""
    from torchvision import datasets, transforms

    size, padding = meta["shape"][1:], config.plain()["data"]["loader"]["crop_padding"]
    transform = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(size, padding=padding, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(meta["mean"], meta["std"]),
        ]
    )
    return datasets.ImageFolder(photos / "train", transform)
