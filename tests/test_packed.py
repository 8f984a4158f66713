"""Packed splits: drawn by class, written to the same bytes, read only when they are whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from src.common.files import sha256_of
from src.data import packed
from src.data.packed import Packed, PackedError, duplicates, pack_images, stratified_holdout

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
    """A folder with `tiny` in it."""
    packed.write(tiny(), tmp_path / "packed", config=CONFIG, source=SOURCE)
    return tmp_path / "packed"


# --- what is held out -------------------------------------------------------------------------------------------------


def test_each_class_gives_its_share_and_no_example_is_lost() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    np.random.default_rng(0).shuffle(labels)
    stay, held = stratified_holdout(labels, 0.2, seed=0)
    assert np.bincount(labels[held]).tolist() == [20, 10, 2]
    assert np.bincount(labels[stay]).tolist() == [80, 40, 8]
    assert sorted([*stay, *held]) == list(range(160))


def test_the_same_seed_holds_out_the_same_and_another_seed_others() -> None:
    labels = np.arange(200) % 4
    once, twice, other = (stratified_holdout(labels, 0.1, seed=seed)[1] for seed in (3, 3, 4))
    assert np.array_equal(once, twice)
    assert not np.array_equal(once, other)
    assert np.all(np.diff(once) > 0)  # the order of the data stays


@pytest.mark.parametrize(("fraction", "held_of_two"), [(0.01, 1), (0.5, 1), (0.99, 1)])
def test_a_tiny_class_gives_one_and_keeps_one(fraction: float, held_of_two: int) -> None:
    labels = np.array([0] * 100 + [1] * 2)
    stay, held = stratified_holdout(labels, fraction, seed=0)
    assert (labels[held] == 1).sum() == held_of_two
    assert (labels[stay] == 1).sum() == 2 - held_of_two


def test_a_class_of_one_example_keeps_it() -> None:
    stay, held = stratified_holdout(np.array([0] * 10 + [1]), 0.5, seed=0)
    assert 10 in stay
    assert len(held) == 5


def test_equal_examples_are_counted_within_and_between_splits() -> None:
    report = duplicates({"train": [b"a", b"b", b"a", b"a"], "val": [b"c"], "test": [b"a", b"b", b"b", b"d"]})
    assert report == {"train": 2, "val": 0, "test": 1, "train/val": 0, "train/test": 3, "val/test": 0}


# --- images -----------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_those_of_the_training_part_alone() -> None:
    train, test = images(40), images(4, seed=9) // 4
    labels = np.arange(40) % 2
    made = pack_images((train, labels), None, (test, labels[:4]), classes="ab", val_fraction=0.25, split_seed=0)
    kept = made.splits["train"]["images"] / 255
    assert len(kept) == 30
    assert made.meta["mean"] == pytest.approx(kept.mean(axis=(0, 2, 3)), abs=1e-6)
    assert made.meta["std"] == pytest.approx(kept.std(axis=(0, 2, 3)), abs=1e-6)
    assert made.meta["shape"] == [3, 4, 4]


def test_a_channel_without_contrast_can_still_be_divided_by() -> None:
    train = np.full((4, 1, 4, 4), 7, np.uint8)
    made = pack_images(
        (train, np.arange(4) % 2), None, (train, np.zeros(4, int)), classes="ab", val_fraction=0.5, split_seed=0
    )
    assert made.meta["std"] == [0.001]
    assert made.meta["duplicates"]["train/test"] == 4


def test_a_validation_part_that_is_given_is_taken_as_it_is() -> None:
    labels = np.arange(6) % 2
    parts = [(images(6, seed), labels) for seed in range(3)]
    made = pack_images(*parts, classes=["a", "b"], val_fraction=0.5, split_seed=0)
    for name, (pixels, _) in zip(("train", "val", "test"), parts, strict=True):
        assert np.array_equal(made.splits[name]["images"], pixels)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    for split, arrays in tiny().splits.items():
        read = packed.read_split(folder, split)
        assert read.keys() == arrays.keys()
        for key, value in arrays.items():
            assert np.array_equal(read[key].numpy(), value)
            assert read[key].numpy().dtype == value.dtype
    meta = packed.read_meta(folder)
    assert (meta["classes"], meta["config"], meta["source"]) == (["é", "b"], CONFIG, SOURCE)
    assert {split: facts["examples"] for split, facts in meta["splits"].items()} == {"train": 6, "test": 3}


def test_the_same_splits_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    reordered = {k: dict(reversed(v.items())) for k, v in tiny().splits.items()}
    packed.write(Packed(reordered, tiny().meta), again, config=dict(reversed(CONFIG.items())), source=SOURCE)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["meta.json", "origin.json", "test.safetensors", "train.safetensors"]
    for name in names:
        assert sha256_of(again / name) == sha256_of(folder / name)


def test_an_array_that_is_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    pairs = images(8).reshape(4, 2, 3, 4, 4)
    made = Packed({"train": {"input": pairs[:, 1], "target": pairs[:, 0].transpose(0, 1, 3, 2)}}, {"kind": "pairs"})
    packed.write(made, tmp_path, config={}, source={})
    read = packed.read_split(tmp_path, "train")
    assert np.array_equal(read["input"].numpy(), pairs[:, 1])
    assert np.array_equal(read["target"].numpy(), pairs[:, 0].transpose(0, 1, 3, 2))


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_bit_is_refused_and_the_file_named(place: int, folder: Path) -> None:
    path = folder / "train.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackedError, match=r"train\.safetensors is damaged .*run `dvc repro`"):
        packed.read_split(folder, "train")
    assert len(packed.read_split(folder, "test")["labels"]) == 3


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("train.safetensors", None, r"train\.safetensors is missing: run `dvc repro`"),
        ("train.safetensors", b"", r"train\.safetensors is damaged"),
        ("meta.json", None, r"meta\.json is missing: run `dvc repro`"),
        ("meta.json", b'{"splits": ', r"meta\.json is damaged .*run `dvc repro`"),
    ],
)
def test_a_missing_or_cut_file_is_named_with_the_remedy(
    name: str, damage: bytes | None, told: str, folder: Path
) -> None:
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage)
    with pytest.raises(PackedError, match=told) as error:
        packed.read_split(folder, "train")
    assert "\n" not in str(error.value)


def test_the_meta_tells_nothing_of_when_and_where(folder: Path) -> None:
    assert json.loads((folder / "meta.json").read_text()).keys() == {"kind", "classes", "splits"}
    assert json.loads((folder / "origin.json").read_text()).keys() == {"config", "source"}
    for name in ("meta.json", "origin.json"):
        assert str(folder.parent) not in (folder / name).read_text()
