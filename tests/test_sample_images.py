"""The drawn CIFAR-10 has the official format, and its records are images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from src.data.fetching.archives import read_archive
from src.data.samples.images import draw

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    archive = tmp_path_factory.mktemp("samples") / "cifar-10-binary.tar.gz"
    draw(archive, train=203, test=50)
    return dict(read_archive(archive))


def test_cifar10_has_the_official_files_and_records_of_3073_bytes(cifar10: dict[str, bytes]) -> None:
    root = "cifar-10-batches-bin"
    assert cifar10[f"{root}/batches.meta.txt"].decode().split() == CIFAR10_NAMES
    sizes = {name: len(content) / 3073 for name, content in cifar10.items() if name.endswith(".bin")}
    batches = dict(zip((f"{root}/data_batch_{n}.bin" for n in range(1, 6)), (41, 41, 41, 40, 40), strict=True))
    assert sizes == {**batches, f"{root}/test_batch.bin": 50}


def test_cifar10_labels_are_balanced_and_shuffled(cifar10: dict[str, bytes]) -> None:
    test = np.frombuffer(cifar10["cifar-10-batches-bin/test_batch.bin"], np.uint8).reshape(-1, 3073)
    assert Counter(test[:, 0].tolist()) == dict.fromkeys(range(10), 5)
    train = b"".join(cifar10[f"cifar-10-batches-bin/data_batch_{n}.bin"] for n in range(1, 6))
    labels = np.frombuffer(train, np.uint8)[::3073]
    assert set(Counter(labels.tolist()).values()) == {20, 21}
    assert (np.diff(labels.astype(int)) < 0).sum() > 50


def test_cifar10_planes_are_smooth_coloured_distinct_images(cifar10: dict[str, bytes]) -> None:
    records = np.frombuffer(cifar10["cifar-10-batches-bin/data_batch_1.bin"], np.uint8).reshape(-1, 3073)
    planes = records[:, 1:].reshape(-1, 3, 32, 32).astype(float)
    step = {axis: np.abs(np.diff(planes, axis=axis)).mean() for axis in (1, 2, 3)}
    assert max(step[2], step[3]) < planes.std() / 2  # neighbours in a plane resemble each other
    assert step[1] > 1  # red, green and blue differ
    assert len(np.unique(records[:, 1:], axis=0)) == len(records)


def test_train_and_test_images_differ(tmp_path: Path) -> None:
    draw(tmp_path / "c", train=10, test=10)
    members = dict(read_archive(tmp_path / "c"))
    train = b"".join(members[f"cifar-10-batches-bin/data_batch_{n}.bin"] for n in range(1, 6))
    assert train != members["cifar-10-batches-bin/test_batch.bin"]
