"""The drawn facades have the official format, and their photos match their label maps."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from src.data.fetching.archives import read_archive
from src.data.samples.facades import draw
from src.data.sets.facade_palette import FACADE_PALETTE


@pytest.fixture(scope="module")
def facades(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    archive = tmp_path_factory.mktemp("samples") / "facades.tar.gz"
    draw(archive, train=12, val=2, test=3)
    return dict(read_archive(archive))


def test_facades_are_numbered_from_one_in_each_split(facades: dict[str, bytes]) -> None:
    counts = {"train": 12, "val": 2, "test": 3}
    assert set(facades) == {f"facades/{s}/{n}.jpg" for s, count in counts.items() for n in range(1, count + 1)}
    for content in facades.values():
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (512, 256))
    assert len(set(facades.values())) == len(facades)


def test_label_maps_keep_the_palette_in_jpeg_and_show_every_class(facades: dict[str, bytes]) -> None:
    palette = np.array(list(FACADE_PALETTE.values()), float)
    counts: Counter[int] = Counter()
    close = []
    for content in facades.values():
        labels = np.asarray(Image.open(io.BytesIO(content)), float)[:, 256:]
        distance = np.linalg.norm(labels[:, :, None] - palette, axis=-1)
        close.append(np.mean(distance.min(-1) < 30))
        counts.update(distance.argmin(-1)[distance.min(-1) < 15].tolist())
    assert np.mean(close) > 0.8  # 0.81 in the official archive
    assert min(counts[label] for label in range(12)) > 50


def test_the_colours_of_the_palette_are_distinguishable() -> None:
    palette = np.array(list(FACADE_PALETTE.values()), float)
    distance = np.linalg.norm(palette[:, None] - palette, axis=-1)
    assert distance[~np.eye(12, dtype=bool)].min() > 50


def test_the_photo_matches_the_label_map(facades: dict[str, bytes]) -> None:
    """Within one house, panes are darker than the wall beside them, and the photo is no copy of the map."""
    palette = np.array(list(FACADE_PALETTE.values()), float)
    wall, window = (list(FACADE_PALETTE).index(label) for label in ("facade", "window"))
    contrasts = []
    for content in facades.values():
        pair = np.asarray(Image.open(io.BytesIO(content)), float)
        labels = np.linalg.norm(pair[:, 256:, None] - palette, axis=-1).argmin(-1)
        grey = pair[:, :256].mean(-1)
        contrasts.append(grey[labels == wall].mean() - np.quantile(grey[labels == window], 0.3))
        assert np.abs(pair[:, :256] - pair[:, 256:]).mean() > 40
    assert np.median(contrasts) > 20
