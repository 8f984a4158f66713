"""The archives of the embedded samples: reproducible bytes, without dates, owners or names."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from src.data.samples import facades, images, reviews


@pytest.mark.parametrize(
    "make",
    [
        partial(images.draw, train=10, test=10),
        partial(facades.draw, train=1, val=1, test=1),
        partial(reviews.draw, train=20, test=10),
    ],
    ids=["cifar10", "facades", "reviews"],
)
def test_the_seed_determines_the_bytes(make: Callable[..., None], tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("first.tar.gz", "second.tar.gz", "other.tar.gz")]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        make(path, seed=seed)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second
    assert gzip.decompress(first) != gzip.decompress(other)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_archive_members_carry_no_date_and_no_owner(tmp_path: Path) -> None:
    archive = tmp_path / "new" / "cifar.tar.gz"
    images.draw(archive, train=5, test=1)
    with tarfile.open(archive) as tar:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.isreg()) for entry in tar} == {
            (0, 0, 0, "", True)
        }
    assert archive.read_bytes()[3:8] == bytes(5)  # gzip: no flags (so no file name), no time
