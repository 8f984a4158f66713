"""MNIST: reading of the IDX format, refusal of damaged files, the sample, download file by file."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from src.common.errors import ConfigError
from src.common.files import sha256_of
from src.configuration.composing import compose
from src.data.fetching import obtaining
from src.data.fetching.files import SourceError
from src.data.samples.digits import draw
from src.data.sets.mnist import DIGITS, Mnist, read_idx
from src.download import download
from src.preprocess import preprocess
from tests.loopback import Host
from tests.tiny_data import write_tar


def idx(values: np.ndarray) -> bytes:
    """`values`, uint8 of any shape, as an IDX file."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def members(folder: str = "mnist", classes: int = 3, is_gzipped: bool = True) -> dict[str, bytes]:
    """30 train and 6 test images of 4x5 pixels; the first pixel of an image is its label."""
    files = {}
    for split, count in (("train", 30), ("t10k", 6)):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = np.random.default_rng(count).integers(0, 256, (count, 4, 5), np.uint8)
        images[:, 0, 0] = labels
        for part, values in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{folder}/{split}-{part}-ubyte"
            if is_gzipped:
                files[f"{name}.gz"] = gzip.compress(idx(values))
            else:
                files[name] = idx(values)
    return files


def mnist(classes: int = 3) -> Mnist:
    return Mnist(classes=[str(number) for number in range(classes)], val_fraction=0.1)


@pytest.mark.parametrize("is_gzipped", [True, False])
def test_images_keep_their_labels(is_gzipped: bool, tmp_path: Path) -> None:
    data = mnist().pack(write_tar(tmp_path / "m.tar", members(is_gzipped=is_gzipped)))
    assert data.meta["shape"] == [1, 4, 5]
    assert {split: len(arrays["labels"]) for split, arrays in data.splits.items()} == {"train": 27, "val": 3, "test": 6}
    for arrays in data.splits.values():
        assert arrays["images"][:, 0, 0, 0].tolist() == arrays["labels"].tolist()


def test_a_folder_of_the_user_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obtaining, "ROOT", tmp_path)
    for name, content in members("mine", classes=10).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    fashion = ["experiment=mnist_cnn", "data=fashion_mnist", "profile=full", "output=out"]
    config = compose([*fashion, f"data_folder={tmp_path / 'data'}", f"data.archive={tmp_path / 'mine'}"])
    download(config)
    preprocess(config)
    assert (config.processed / "test.safetensors").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files.pop("mnist/t10k-labels-idx1-ubyte.gz"), "no t10k-labels in it"),
        (
            lambda files: files.update({"mnist/train-labels-idx1-ubyte.gz": gzip.compress(idx(np.zeros(7, np.uint8)))}),
            "do not fit",
        ),
        (
            lambda files: files.update(
                {"mnist/t10k-labels-idx1-ubyte.gz": gzip.compress(idx(np.full(6, 3, np.uint8)))}
            ),
            "holds the label 3, but data.classes names 3 classes",
        ),
    ],
)
def test_an_incomplete_archive_is_refused(damage: object, message: str, tmp_path: Path) -> None:
    files = members()
    damage(files)  # type: ignore[operator]
    archive = write_tar(tmp_path / "m.tar", files)
    with pytest.raises(SourceError) as error:
        mnist().pack(archive)
    assert message in str(error.value)
    assert str(archive) in str(error.value)


DAMAGED = {
    "empty": b"",
    "half a head": b"\0\0\x08",
    "a byte short": idx(np.zeros((2, 3), np.uint8))[:-1],
    "floats": b"\0\0\x0d\x01" + bytes(8),
    "gzip cut short": gzip.compress(idx(np.zeros((20, 30), np.uint8)))[:-9],
    "a web page": gzip.compress(b"<html>"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_file_that_is_not_idx_is_refused_and_named(content: bytes) -> None:
    with pytest.raises(SourceError, match=r"a\.tar: images is not an IDX file"):
        read_idx(content, "a.tar: images")


def test_the_sample_is_reproducible_and_its_digits_can_be_classified(tmp_path: Path) -> None:
    dataset = Mnist(classes=DIGITS)
    draw(tmp_path / "one.tar")
    draw(tmp_path / "two.tar")
    assert sha256_of(tmp_path / "one.tar") == sha256_of(tmp_path / "two.tar")
    data = dataset.pack(tmp_path / "one.tar")
    assert data.meta["shape"] == [1, 28, 28]
    assert len(data.splits["test"]["labels"]) == 360
    assert np.bincount(data.splits["train"]["labels"]).min() > 100
    # The nearest training image is mostly of the same class.
    train, test = (data.splits[split]["images"].reshape(-1, 784).astype(np.float32) for split in ("train", "test"))
    distances = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)
    nearest = data.splits["train"]["labels"][distances.argmin(1)]
    assert (nearest == data.splits["test"]["labels"]).mean() > 0.9


def test_fashion_mnist_has_no_sample(tmp_path: Path) -> None:
    config = compose(["experiment=mnist_cnn", "data=fashion_mnist", "output=out", f"data_folder={tmp_path}"])
    with pytest.raises(ConfigError, match="has no embedded sample; add profile=full"):
        download(config)


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(obtaining, "ROOT", tmp_path)  # for partial downloads
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return ["experiment=mnist_cnn", "profile=full", "output=out", f"data_folder={tmp_path / 'data'}"]


def test_official_files_become_one_archive_and_a_wrong_sha256_is_refused(official: list[str], tmp_path: Path) -> None:
    files = {name.rpartition("/")[2]: content for name, content in members(classes=10).items()}
    with Host() as host:
        sums = {}
        for name, content in files.items():
            host.serve(f"/mnist/{name}", content)
            (tmp_path / name).write_bytes(content)
            sums[name] = sha256_of(tmp_path / name)
        listed = ", ".join(f"{name}: {digest}" for name, digest in sums.items())
        config = compose(
            [*official, f"data.official={{urls: [{host.url}/gone, {host.url}/mnist/], files: {{{listed}}}}}"]
        )
        download(config)
        preprocess(config)
        assert (config.processed / "train.safetensors").is_file()
        assert [path.name for path in (tmp_path / "data" / ".partial").iterdir() if path.is_dir()] == []

        wrong = listed.replace(sums["t10k-labels-idx1-ubyte.gz"], "0" * 64)
        config = compose([*official, f"data.official={{urls: [{host.url}/mnist], files: {{{wrong}}}}}"])
        (config.raw / "mnist.tar").unlink()
        with pytest.raises(SourceError, match="t10k-labels"):
            download(config)
        assert not (config.raw / "mnist.tar").exists()
