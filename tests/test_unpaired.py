"""Two domains without pairs: the layouts that are read, what is refused, the batches, and the drawn sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from src.data.fetching.files import SourceError
from src.data.kinds.unpaired import UnpairedBatches, UnpairedLoader, crops
from src.data.samples import domains as sample
from src.data.sets.domains import DomainClasses, UnpairedDomains, UnpairedHalves
from tests.tiny_data import packed_data, plain_png, png, write_tar


def members(layout: str = "{split}{domain}", **counts: int) -> dict[str, bytes]:
    """Red images of A and blue ones of B, of brightness 100 + number; `counts` by split and domain, e.g. trainA=3."""
    files = {}
    for place, count in counts.items():
        folder = layout.format(split=place[:-1], domain=place[-1])
        for i in range(count):
            colour = (100 + i, 0, 0) if place[-1] == "A" else (0, 0, 100 + i)
            files[f"h2z/{folder}/{i}.png"] = plain_png(colour)
    return files


OFFICIAL: dict[str, Any] = {"trainA": 6, "trainB": 10, "testA": 2, "testB": 3}


def brightness(images: np.ndarray) -> list[int]:
    return sorted(images.max((1, 2, 3)).tolist())


# --- the sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["{split}{domain}", "{domain}/{split}"])
def test_domains_are_read_in_both_layouts_and_val_is_drawn_from_each(layout: str, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "d.tar", members(layout, **OFFICIAL))
    data = packed_data(UnpairedDomains(size=8, enlarge=1.5, val_fraction=0.2), archive)
    sizes = {split: {name: images.shape for name, images in arrays.items()} for split, arrays in data.splits.items()}
    assert sizes == {
        "train": {"a": (5, 3, 12, 12), "b": (8, 3, 12, 12)},
        "val": {"a": (1, 3, 8, 8), "b": (2, 3, 8, 8)},
        "test": {"a": (2, 3, 8, 8), "b": (3, 3, 8, 8)},
    }
    for name, channel, count in (("a", 0, 6), ("b", 2, 10)):
        images = [data.splits[split][name] for split in ("train", "val")]
        assert sorted(brightness(images[0]) + brightness(images[1])) == list(range(100, 100 + count))
        assert all((part[:, channel] >= 100).all() for part in images)
    assert data.meta["shape"] == [3, 8, 8]


def test_a_validation_part_of_the_archive_is_kept(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "d.tar", members(**OFFICIAL, valA=1, valB=4))
    data = packed_data(UnpairedDomains(size=8), archive)
    assert [len(data.splits[split]["b"]) for split in ("train", "val", "test")] == [10, 4, 3]


def test_the_same_archive_gives_two_classes_without_duplicates(tmp_path: Path) -> None:
    files = members(**OFFICIAL)
    files["h2z/trainA/again.png"] = files["h2z/trainA/0.png"]
    files["h2z/trainB/seen.png"] = files["h2z/testB/1.png"]  # as h2z/trainB/1.png is already
    data = packed_data(
        DomainClasses(classes=["horse", "zebra"], size=8, val_fraction=0.2), write_tar(tmp_path / "d.tar", files)
    )
    # Of the plain colours those of a test image are gone from training, too: 0 and 1 of A, 0 to 2 of B.
    assert {split: np.bincount(arrays["labels"]).tolist() for split, arrays in data.splits.items()} == {
        "train": [3, 6],
        "val": [1, 1],
        "test": [2, 3],
    }
    assert data.unused == {"duplicates of other images": 7}
    assert data.meta["classes"] == ["horse", "zebra"]
    red = data.splits["test"]["images"][data.splits["test"]["labels"] == 0]
    assert (red[:, 0] >= 100).all()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (members(trainA=2, testA=2), "1 domains of images (A), not two"),
        (members(trainA=2, trainB=2, testA=2), "no test images of B"),
        (members(**OFFICIAL, valA=1), "no val images of B"),
        (members("{domain}/{split}", **OFFICIAL) | members("C/{split}", trainA=1), "3 domains of images (A, B, C)"),
        (members(**OFFICIAL) | {"h2z/valA/x.png": b"x", "h2z/valB/x.png": b"x"}, "x.png can't be read as an image"),
        (members(**OFFICIAL) | {"other/trainA/x.png": plain_png((0, 0, 0))}, "the same part of the data"),
        ({"h2z/readme.txt": b"x"}, "0 domains of images, not two"),
    ],
)
def test_another_layout_is_refused_by_name(files: Mapping[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as error:
        packed_data(UnpairedDomains(size=8), write_tar(tmp_path / "d.tar", files))
    assert message in str(error.value)


def test_what_is_not_used_is_counted(tmp_path: Path) -> None:
    files = members(**OFFICIAL) | {"h2z/trainA/notes.txt": b"", "h2z/.cache/trainA/x.png": b"", "h2z/more/x.png": b""}
    data = packed_data(UnpairedDomains(size=8), write_tar(tmp_path / "d.tar", files))
    assert data.unused == {"of another kind": 1, "hidden": 1, "outside the domains' folders": 1}


def test_a_paired_test_needs_the_same_names_in_both_domains(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "d.tar", members(**OFFICIAL))
    with pytest.raises(SourceError, match=r"data.paired_test: the test image 2.png is in one domain only"):
        packed_data(UnpairedDomains(size=8, paired_test=True), archive)


def test_the_halves_of_pairs_become_domains_that_keep_their_order(tmp_path: Path) -> None:
    left, right = np.full((8, 8, 3), (200, 0, 0), np.uint8), np.full((8, 8, 3), (0, 0, 90), np.uint8)
    both = png(np.concatenate([left, right], 1))
    files = {f"f/{split}/{i}.png": both for split in ("train", "val", "test") for i in range(2)}
    data = packed_data(UnpairedHalves(size=8, enlarge=1.25), write_tar(tmp_path / "p.tar", files))
    assert {split: arrays["a"].shape[-1] for split, arrays in data.splits.items()} == {"train": 10, "val": 8, "test": 8}
    assert (data.splits["train"]["a"][:, 0] == 200).all()
    assert (data.splits["train"]["b"][:, 2] == 90).all()
    assert data.meta["paired_test"]


# --- batches ----------------------------------------------------------------------------------------------------------


def split(a: int, b: int, side: int = 8) -> dict[str, Tensor]:
    """Images whose pixels are their index."""
    return {
        name: torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()
        for name, count in (("a", a), ("b", b))
    }


def batches(a: int, b: int, *, size: int = 2, train: bool = True, side: int = 8, **options: Any) -> UnpairedBatches:
    loader = UnpairedLoader(batch_size=size, eval_batch_size=size)
    return UnpairedBatches(split(a, b, side), {"kind": "unpaired", "shape": [3, 8, 8]}, loader, train=train, **options)


def shown(source: UnpairedBatches) -> tuple[list[int], list[int]]:
    """The indices of the images of both domains, in the order of an epoch."""
    a, b = zip(*source, strict=True)
    return torch.cat(a)[:, 0, 0, 0].tolist(), torch.cat(b)[:, 0, 0, 0].tolist()


def test_an_epoch_is_as_long_as_the_longer_domain_and_the_shorter_begins_again_in_another_order() -> None:
    source = batches(3, 10)
    assert len(source) == 5
    a, b = shown(source)
    assert sorted(b) == list(range(10))
    rounds = [a[0:3], a[3:6], a[6:9]]
    assert all(sorted(part) == [0, 1, 2] for part in rounds)
    assert len({tuple(part) for part in rounds}) > 1


def test_the_order_depends_on_seed_epoch_and_domain() -> None:
    def order(seed: int, epoch: int) -> tuple[list[int], list[int]]:
        source = batches(20, 20, seed=seed)
        source.set_epoch(epoch)
        return shown(source)

    assert order(0, 0) == order(0, 0)
    orders = [part for key in ((0, 0), (0, 1), (1, 0)) for part in order(*key)]
    assert len({tuple(part) for part in orders}) == 6


def test_a_resumed_epoch_goes_on_with_the_same_batches() -> None:
    complete = list(batches(5, 8, side=11))
    resumed = batches(5, 8, side=11)
    resumed.skip = 2
    for expected, actual in zip(complete[2:], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, actual, strict=True))


@pytest.mark.parametrize(("a", "b"), [(3, 10), (10, 3), (7, 7), (1, 9)])
def test_evaluation_shows_each_image_once(a: int, b: int) -> None:
    for size in (1, 2, 4):
        first, second = shown(batches(a, b, size=size, train=False))
        assert first == list(range(a))
        assert second == list(range(b))


def test_ranks_share_an_epoch() -> None:
    parts = [shown(batches(6, 8, size=4, rank=rank, world=2)) for rank in (0, 1)]
    assert sorted(parts[0][1] + parts[1][1]) == list(range(8))


def test_crops_are_windows_of_their_images_mirrored_half_of_the_time() -> None:
    images = torch.arange(2 * 3 * 6 * 7, dtype=torch.uint8).view(2, 3, 6, 7)
    chosen = torch.tensor([0, 1] * 100)
    windows = {
        (number, bytes(window.flip(-1).contiguous().numpy() if mirrored else window.contiguous().numpy())): mirrored
        for number in (0, 1)
        for top in range(3)
        for left in range(4)
        for window in [images[number, :, top : top + 4, left : left + 4]]
        for mirrored in (False, True)
    }
    cut = crops(images, chosen, [4, 4], True, torch.Generator().manual_seed(0))
    drawn = [(int(number), bytes(crop.contiguous().numpy())) for number, crop in zip(chosen, cut, strict=True)]
    mirrored = [windows[crop] for crop in drawn]  # each is one of the windows
    assert 70 < sum(mirrored) < 130
    assert len(set(drawn)) == 48


def test_evaluation_takes_the_middle_of_larger_images() -> None:
    larger = {name: torch.zeros(1, 3, 10, 10, dtype=torch.uint8) for name in ("a", "b")}
    larger["a"][:, :, 1:9, 1:9] = 1
    loader = UnpairedLoader(batch_size=1, eval_batch_size=1)
    source = UnpairedBatches(larger, {"kind": "unpaired", "shape": [3, 8, 8]}, loader, train=False)
    ((a, b),) = source
    assert a.shape == b.shape == (1, 3, 8, 8)
    assert (a == 1).all()


# --- the sample -------------------------------------------------------------------------------------------------------


def test_the_sample_s_domains_differ_within_the_blobs_alone() -> None:
    for seed in range(5):
        plain, ringed = sample.scene(seed).astype(int)
        changed = (plain != ringed).any(-1)
        assert 0.02 < changed.mean() < 0.5
        assert (ringed[changed].sum(-1) <= plain[changed].sum(-1)).mean() > 0.9


def test_the_sample_is_packed_with_pairs_to_test_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "COUNTS", {"trainA": 3, "trainB": 4})
    monkeypatch.setattr(sample, "TEST", 2)
    for path in (first := tmp_path / "first.zip", again := tmp_path / "again.zip"):
        sample.draw(path)
    assert first.read_bytes() == again.read_bytes()
    data = packed_data(UnpairedDomains(size=32, paired_test=True), first)
    assert [len(data.splits["train"][name]) + len(data.splits["val"][name]) for name in ("a", "b")] == [3, 4]
    a, b = (data.splits["test"][name].astype(int) for name in ("a", "b"))
    assert ((a - b).mean((2, 3))[:, 0] > 0).all()  # orange there, blue and dark rings here
    corner = np.abs(a - b)[:, :, 0, 0]
    assert (corner == 0).mean() > 0.4  # and the ground is the same
