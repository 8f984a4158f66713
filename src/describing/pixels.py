"""What is measured of images: brightness, contrast, sharpness, and a perceptual hash."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from src.common.hardware import cores
from src.describing.digests import digest
from src.describing.stored import StoredArray

SIDE = 32  # of the images that hashes and likeness see
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L
CHANNELS = {1: (), 3: ("red", "green", "blue")}
TITLES = {
    "brightness": "brightness: mean grey level, 0 to 255",
    "contrast": "contrast: standard deviation of the grey levels",
    "sharpness": "sharpness: standard deviation of the Laplacian",
    **{name: f"{name}: mean level, 0 to 255" for name in CHANNELS[3]},
    **{f"{name} contrast": f"{name}: standard deviation of the levels" for name in CHANNELS[3]},
}


@dataclass(frozen=True)
class Measured:
    """Of N images: features float32 [N] by name, perceptual hashes uint64 [N], digests of the pixels uint64 [N]."""

    features: dict[str, np.ndarray]
    hashes: np.ndarray
    digests: np.ndarray


def measure(images: StoredArray) -> Measured:
    """Measures images, uint8 [N, C, H, W], C of 1 or 3, in one pass over them, on all cores."""
    parts: list[Measured] = []
    pieces, workers = images.pieces(), cores()
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(pieces, workers)):  # no more pieces in memory than are measured
            parts += pool.map(_measure, group)
    return Measured(
        {name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features},
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.digests for part in parts]),
    )


def _measure(images: np.ndarray) -> Measured:
    grey = _grey(images)
    return Measured(_features(images, grey), hashes(grey), digest(images))


def _grey(images: np.ndarray) -> np.ndarray:
    """Images uint8 [n, C, H, W] as grey levels float32 [n, H, W]."""
    if images.shape[1] == 1:
        return images[:, 0].astype(np.float32)
    grey = images[:, 0] * GREY[0]
    grey += images[:, 1] * GREY[1]
    grey += images[:, 2] * GREY[2]
    return grey


def _features(images: np.ndarray, grey: np.ndarray) -> dict[str, np.ndarray]:
    """The features of `TITLES`, float32 [n] each, of images uint8 [n, C, H, W] and their grey levels.

    The variance of the Laplacian as a measure of focus: Pech-Pacheco et al., 2000.
    """
    mean, deviation = _moments(grey)
    features = {"brightness": mean, "contrast": deviation}
    if min(grey.shape[1:]) >= 3:
        laplacian = -4 * grey[:, 1:-1, 1:-1]
        for part in (grey[:, :-2, 1:-1], grey[:, 2:, 1:-1], grey[:, 1:-1, :-2], grey[:, 1:-1, 2:]):
            laplacian += part
        features["sharpness"] = _moments(laplacian)[1]
    for channel, name in enumerate(CHANNELS[images.shape[1]]):
        features[name], features[f"{name} contrast"] = _moments(images[:, channel].astype(np.float32))
    return features


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each image, float32 [n, ...]."""
    flat = values.reshape(len(values), -1)
    mean = flat.mean(1)
    square = np.einsum("np,np->n", flat, flat) / flat.shape[1]
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def hashes(grey: np.ndarray) -> np.ndarray:
    """The perceptual hash of each image, uint64 [n], of grey levels float32 [n, H, W].

    pHash (Zauner, 2010): the image is brought to 32x32 by areas; of its discrete cosine transform the 8x8 coefficients
    of the lowest frequencies each give a bit, whether it is above their median. Changes of brightness, contrast and
    size, and JPEG's losses, change few bits.
    """
    down, across = (_cosines() @ areas(size, SIDE) for size in grey.shape[1:])
    block = (down @ (grey @ across.T)).reshape(len(grey), 64)
    return np.packbits(block > np.median(block, 1, keepdims=True), axis=1).view(">u8").ravel().astype(np.uint64)


def _cosines() -> np.ndarray:
    """Rows 0 to 7 of the cosine transform of `SIDE` points: float32 [8, SIDE]."""
    angles = np.pi * np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
    return np.cos(angles).astype(np.float32)


@functools.cache
def areas(size: int, cells: int) -> np.ndarray:
    """The means over `cells` equal areas of `size` points, as a matrix: float32 [cells, size]."""
    edges, points = np.linspace(0, size, cells + 1), np.arange(size)
    shares = np.minimum(edges[1:, None], points + 1) - np.maximum(edges[:-1, None], points)
    return (shares.clip(0) * (cells / size)).astype(np.float32)


def thumbnails(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures uint8 [H, W, 3], of any sizes, in 32x32, as means over areas: float32 [n, 32, 32, 3]."""
    small = np.empty((len(pictures), SIDE, SIDE, 3), np.float32)
    for height, width, _ in {picture.shape for picture in pictures}:
        places = [place for place, picture in enumerate(pictures) if picture.shape[:2] == (height, width)]
        stacked = np.stack([pictures[place] for place in places]).astype(np.float32)
        if (height, width) != (SIDE, SIDE):
            rows = areas(height, SIDE) @ stacked.reshape(len(places), height, -1)
            stacked = areas(width, SIDE) @ rows.reshape(len(places), SIDE, width, 3)
        small[places] = stacked
    return small


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The correlation of each thumbnail with that of another, float32 [n, ...] both; 0 where one is of one colour."""
    flat = [images.reshape(len(images), -1) for images in (first, second)]
    left, right = (values - values.mean(1, keepdims=True) for values in flat)
    scale = np.sqrt(np.einsum("np,np->n", left, left) * np.einsum("np,np->n", right, right))
    return np.einsum("np,np->n", left, right) / np.maximum(scale, 1)
