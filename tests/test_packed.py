"""Packed splits: stratified holdout, reproducible bytes, refusal of damaged files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from src.common.files import sha256_of
from src.data import packed, verifying
from src.data.packed import Packed, PackedError, duplicates, pack_images, stratified_holdout
from src.data.sets.image_folder import ImageFolders
from src.data.writing import write_packed
from tests.tiny_data import write_tar

CONFIG = {"profile": "sample", "name": "tiny"}
SOURCE = {"origin": "sample", "sha256": "0" * 64}


def images(count: int, seed: int = 0, channels: int = 3, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), np.uint8)


def tiny() -> Packed:
    """Two splits of images."""
    splits = {
        "train": {"images": images(6), "labels": np.arange(6) % 2},
        "test": {"images": images(3, seed=1), "labels": np.zeros(3, np.int64)},
    }
    return Packed(splits, {"kind": "images", "classes": ["é", "b"]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the packed splits of `tiny`."""
    write_packed(tiny(), tmp_path / "packed", config=CONFIG, source=SOURCE)
    return tmp_path / "packed"


# --- the held-out part ------------------------------------------------------------------------------------------------


def test_the_holdout_is_stratified_and_loses_no_example() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    np.random.default_rng(0).shuffle(labels)
    train, val = stratified_holdout(labels, 0.2, seed=0)
    assert np.bincount(labels[val]).tolist() == [20, 10, 2]
    assert np.bincount(labels[train]).tolist() == [80, 40, 8]
    assert sorted([*train, *val]) == list(range(160))


def test_the_seed_determines_the_holdout() -> None:
    labels = np.arange(200) % 4
    first, second, other = (stratified_holdout(labels, 0.1, seed=seed)[1] for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert np.all(np.diff(first) > 0)  # in the order of the data


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.5, 1), (0.99, 1)])
def test_a_class_of_two_examples_is_in_both_parts(fraction: float, held_out: int) -> None:
    labels = np.array([0] * 100 + [1] * 2)
    train, val = stratified_holdout(labels, fraction, seed=0)
    assert (labels[val] == 1).sum() == held_out
    assert (labels[train] == 1).sum() == 2 - held_out


def test_a_class_of_one_example_stays_in_the_training_part() -> None:
    train, val = stratified_holdout(np.array([0] * 10 + [1]), 0.5, seed=0)
    assert 10 in train
    assert len(val) == 5


def test_equal_examples_are_counted_within_and_between_splits() -> None:
    report = duplicates({"train": [b"a", b"b", b"a", b"a"], "val": [b"c"], "test": [b"a", b"b", b"b", b"d"]})
    assert report == {"train": 2, "val": 0, "test": 1, "train/val": 0, "train/test": 3, "val/test": 0}


# --- images -----------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_of_the_training_part_only() -> None:
    train, test = images(40), images(4, seed=9) // 4
    labels = np.arange(40) % 2
    result = pack_images((train, labels), None, (test, labels[:4]), classes="ab", val_fraction=0.25, split_seed=0)
    train_part = result.splits["train"]["images"] / 255
    assert len(train_part) == 30
    assert result.meta["mean"] == pytest.approx(train_part.mean(axis=(0, 2, 3)), abs=1e-6)
    assert result.meta["std"] == pytest.approx(train_part.std(axis=(0, 2, 3)), abs=1e-6)
    assert result.meta["shape"] == [3, 4, 4]


def test_a_constant_channel_has_a_positive_deviation() -> None:
    train = np.full((4, 1, 4, 4), 7, np.uint8)
    result = pack_images(
        (train, np.arange(4) % 2), None, (train, np.zeros(4, int)), classes="ab", val_fraction=0.5, split_seed=0
    )
    assert result.meta["std"] == [0.001]
    assert result.meta["duplicates"]["train/test"] == 4


def test_an_own_validation_part_is_kept_unchanged() -> None:
    labels = np.arange(6) % 2
    parts = [(images(6, seed), labels) for seed in range(3)]
    result = pack_images(*parts, classes=["a", "b"], val_fraction=0.5, split_seed=0)
    for name, (pixels, _) in zip(("train", "val", "test"), parts, strict=True):
        assert np.array_equal(result.splits[name]["images"], pixels)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_written_splits_are_read_back(folder: Path) -> None:
    for split, arrays in tiny().splits.items():
        loaded = packed.read_split(folder, split)
        assert loaded.keys() == arrays.keys()
        for key, value in arrays.items():
            assert np.array_equal(loaded[key].numpy(), value)
            assert loaded[key].numpy().dtype == value.dtype
    meta = packed.read_meta(folder)
    assert (meta["classes"], meta["config"], meta["source"]) == (["é", "b"], CONFIG, SOURCE)
    assert {split: facts["examples"] for split, facts in meta["splits"].items()} == {"train": 6, "test": 3}


def test_the_same_splits_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    reordered = {k: dict(reversed(v.items())) for k, v in tiny().splits.items()}
    write_packed(Packed(reordered, tiny().meta), copy, config=dict(reversed(CONFIG.items())), source=SOURCE)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["meta.json", "origin.json", "test.safetensors", "train.safetensors"]
    for name in names:
        assert sha256_of(copy / name) == sha256_of(folder / name)


def test_the_bytes_are_those_that_safetensors_itself_writes(tmp_path: Path) -> None:
    dtypes = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "f2", "f4", "f8")
    arrays: dict[str, np.ndarray] = {f"é{name}": np.arange(6).reshape(2, 3).astype(name) for name in dtypes}
    arrays |= {"labels": np.arange(7), "empty": np.zeros((0, 4), np.float32), "views": images(4)[::2, ::-1]}
    write_packed(Packed({"train": arrays}, {"kind": "images"}), tmp_path, config={}, source={})
    content = (tmp_path / "train.safetensors").read_bytes()
    assert content == save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    assert packed.read_meta(tmp_path)["splits"]["train"]["sha256"] == hashlib.sha256(content).hexdigest()


def image_archive(path: Path, count: int, size: int) -> Path:
    """`count` JPEGs of two classes for each of train and test."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    names = [f"m/{split}/{'ab'[i % 2]}/{i:05}.jpg" for split in ("test", "train") for i in range(count)]
    return write_tar(path, dict.fromkeys(names, buffer.getvalue()))


PEAK = """
import re, sys
from pathlib import Path
from src.data.sets.image_folder import ImageFolders
from src.data.sets.image_folder import ImageFolders
from src.data.writing import write_packed
from tests.tiny_data import write_tar
for name, size in (("small", 8), ("large", 512)):  # the first imports all that packing needs
    write_packed(ImageFolders(size=size).pack(Path(sys.argv[1], name)), Path(sys.argv[1], "p"), config={}, source={})
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_the_memory_of_packing_does_not_depend_on_the_size_of_the_data(tmp_path: Path) -> None:
    image_archive(tmp_path / "small", 10, 8)
    image_archive(tmp_path / "large", 200, 32)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    before, peak = (int(word) >> 10 for word in done.stdout.split())  # MiB
    size = (tmp_path / "p/train.safetensors").stat().st_size + (tmp_path / "p/test.safetensors").stat().st_size
    assert size > 280 << 20
    assert peak - before < 100
    assert peak < 512


def test_a_row_is_decoded_once_and_hashed_where_it_stands(tmp_path: Path) -> None:
    archive = image_archive(tmp_path / "i.tar", 40, 8)
    dataset = ImageFolders(size=16)
    write_packed(dataset.pack(archive), tmp_path / "p", config={}, source={})
    meta = packed.read_meta(tmp_path / "p")
    for split, facts in meta["splits"].items():
        assert sha256_of(tmp_path / "p" / f"{split}.safetensors") == facts["sha256"]
    assert meta["duplicates"] == {
        "train": 35,
        "val": 3,
        "test": 39,
        "train/val": 4,
        "train/test": 40,
        "val/test": 40,
    }


def test_array_views_are_written_as_they_appear(tmp_path: Path) -> None:
    pairs = images(8).reshape(4, 2, 3, 4, 4)
    views = Packed({"train": {"input": pairs[:, 1], "target": pairs[:, 0].transpose(0, 1, 3, 2)}}, {"kind": "pairs"})
    write_packed(views, tmp_path, config={}, source={})
    loaded = packed.read_split(tmp_path, "train")
    assert np.array_equal(loaded["input"].numpy(), pairs[:, 1])
    assert np.array_equal(loaded["target"].numpy(), pairs[:, 0].transpose(0, 1, 3, 2))


@pytest.mark.parametrize("index", [0, 40, -1])
def test_a_flipped_bit_is_refused_and_the_file_named(index: int, folder: Path) -> None:
    path = folder / "train.safetensors"
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackedError, match=r"train\.safetensors is damaged .*run `dvc repro`"):
        packed.read_split(folder, "train")
    assert len(packed.read_split(folder, "test")["labels"]) == 3


def test_a_large_file_is_hashed_once_and_again_when_it_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(verifying, "NOTED", 0)
    monkeypatch.setattr(verifying, "NOTES", tmp_path / "notes")

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(verifying, "sha256_of", counted)
    path = folder / "train.safetensors"

    def read() -> None:
        packed._read.cache_clear()  # as in another process
        packed.read_split(folder, "train")

    read()
    read()
    assert len(hashed) == 2  # changed a moment ago: it may change again without another time
    monkeypatch.setattr(verifying, "SETTLED_NS", 0)
    read()
    read()
    assert len(hashed) == 3
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a tool does that restores times
    with pytest.raises(PackedError, match="is damaged"):
        read()


def test_a_small_file_is_hashed_at_every_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "NOTES", tmp_path / "notes")
    monkeypatch.setattr(verifying, "SETTLED_NS", 0)
    packed.read_split(folder, "train")
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.safetensors", None, r"train\.safetensors is missing: run `dvc repro`"),
        ("train.safetensors", b"", r"train\.safetensors is damaged"),
        ("meta.json", None, r"meta\.json is missing: run `dvc repro`"),
        ("meta.json", b'{"splits": ', r"meta\.json is damaged .*run `dvc repro`"),
    ],
)
def test_a_missing_or_truncated_file_is_named_with_the_remedy(
    name: str, damage: bytes | None, message: str, folder: Path
) -> None:
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage)
    with pytest.raises(PackedError, match=message) as error:
        packed.read_split(folder, "train")
    assert "\n" not in str(error.value)


def test_the_meta_files_hold_no_date_and_no_path(folder: Path) -> None:
    assert json.loads((folder / "meta.json").read_text()).keys() == {"kind", "classes", "splits"}
    assert json.loads((folder / "origin.json").read_text()).keys() == {"config", "source"}
    for name in ("meta.json", "origin.json"):
        assert str(folder.parent) not in (folder / name).read_text()
