"""Packing on a real Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.common.errors import Failure
from src.configuration.schema import PackingRay
from src.data import rows_on_ray
from src.data.fetching.archives import Archive
from src.data.image_rows import FittedImage, ImageRows, write_rows
from src.data.sets.image_folder import ImageFolders
from src.data.writing import write_packed
from tests.processes import commands_of, kill_node
from tests.tiny_data import png, write_tar

TWO = PackingRay(processes=2)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """60 pictures of noise to train on and 4 to test."""
    random = np.random.default_rng(0)
    members = {
        f"m/{split}/{label}/{i:02}.png": png(random.integers(0, 256, (16, 16, 3), np.uint8))
        for split, count in (("train", 30), ("test", 2))
        for label in "ab"
        for i in range(count)
    }
    return write_tar(tmp_path / "i.tar", members)


def wait_until_busy(node: Any) -> None:
    """Waits until a process of the node decodes; Ray calls it by its task."""
    deadline = time.monotonic() + 60
    while not any("_decode_shard" in command for command in commands_of(node)):
        assert time.monotonic() < deadline


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_packing_on_two_nodes_gives_the_bytes_of_one_machine_though_a_node_is_lost(
    archive: Path, ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_on_ray, "SHARD_BYTES", 8 * 3 * 512 * 512)
    names = sorted(name for name, place in Archive(archive).places.items() if place)
    rows = ImageRows(Archive(archive), names, FittedImage((3, 512, 512)), (1, 3, 512, 512))
    files = {name: tmp_path / name for name in ("local", "ray")}
    for file in files.values():
        file.write_bytes(bytes(8))
    expected = [summary.digests for _, _, summary in write_rows(rows, files["local"], {0: 8})]
    digests = []
    for count, (_, _, summary) in enumerate(rows_on_ray.write_rows_on_ray(rows, files["ray"], {0: 8}, TWO)):
        digests.append(summary.digests)
        if count == 1:
            (node,) = ray_cluster.worker_nodes
            wait_until_busy(node)
            kill_node(node)
    assert [*chain(*digests)] == [*chain(*expected)]
    assert len(digests) == 8
    assert files["ray"].read_bytes() == files["local"].read_bytes()
    metas = [
        write_packed(ImageFolders(size=20).pack(archive), tmp_path / "p", config={}, source={}, ray=ray)
        for ray in (TWO, None)
    ]
    assert metas[0] == metas[1]


def test_packing_names_a_cluster_that_is_not_there(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(Failure, match=r"data\.ray: no Ray cluster at RAY_ADDRESS=127\.0\.0\.1:1"):
        write_packed(ImageFolders(size=8).pack(archive), tmp_path / "p", config={}, source={}, ray=TWO)
    assert not list((tmp_path / "p").iterdir())
