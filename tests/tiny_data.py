"""Tiny archives in the official layouts, and a tiny packed data set."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from src.configuration.composing import compose
from src.configuration.schema import Config
from src.data.packed import Packed
from src.data.sets import DataSet


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Writes a tar of `members`, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def cifar_records(labels: list[int], seed: int = 0) -> bytes:
    """Records of CIFAR-10's binary version: a label byte and 3,072 bytes of noise for every label."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), np.uint8)
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()


def cifar_members(folder: str = "cifar-10-batches-bin") -> dict[str, bytes]:
    """CIFAR-10 with two classes: two files of 20 training images and one of 6 test images."""
    return {
        f"{folder}/batches.meta.txt": b"cat\nship\n\n",
        f"{folder}/data_batch_1.bin": cifar_records([0, 1] * 10, seed=1),
        f"{folder}/data_batch_2.bin": cifar_records([1, 0] * 10, seed=2),
        f"{folder}/test_batch.bin": cifar_records([0, 1] * 3, seed=3),
    }


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 [H, W, 3], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def plain_png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    """A picture of one colour; `size` is (width, height)."""
    return png(np.full((size[1], size[0], 3), colour, np.uint8))


def packed_data(dataset: DataSet, archive: Path) -> Packed:
    """What is written of an archive, read back: arrays and the complete meta."""
    from src.data.writing import write_packed

    with tempfile.TemporaryDirectory(dir=archive.parent) as name:
        data = dataset.pack(archive)
        meta = write_packed(data, Path(name), config={}, source={"origin": archive.name})
        splits = {split: load_file(Path(name) / f"{split}.safetensors") for split in data.splits}
    written = {key: value for key, value in meta.items() if key not in ("splits", "config", "source", "unused")}
    return Packed(splits, written, data.unused)


def noise_digits(folder: Path, *overrides: str) -> Config:
    """Packs a data set of noise (40 train, 21 val, 22 test digits) in `folder`; the configuration of an MLP for it."""
    from src.data.writing import write_packed

    config = compose(
        [
            "experiment=mnist_mlp",
            "trainer.threads=1",
            "data.loader.batch_size=10",
            f"data_folder={folder}",
            f"output={folder}/output",
            *overrides,
        ]
    )
    random = np.random.default_rng(0)
    splits = {
        name: {"images": random.integers(0, 256, (count, 1, 28, 28), np.uint8), "labels": np.arange(count) % 10}
        for name, count in (("train", 40), ("val", 21), ("test", 22))
    }
    meta = {"kind": "images", "classes": list("0123456789"), "shape": [1, 28, 28], "mean": [0.5], "std": [0.3]}
    write_packed(
        Packed(splits, meta),
        config.processed,
        config=config.packing,
        source={"origin": "noise", "sha256": "0" * 64},
    )
    return config
