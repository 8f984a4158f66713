"""The embedded sample of MNIST: handwritten digits of 8x8 pixels, enlarged to MNIST's size and format, offline.

They come with scikit-learn: the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, 1998), 1,797 digits by 13 people.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.samples.archive import write_archive

SIDE, BOX = 28, 20  # pixels: an image, and the centred box that a digit fills, as in MNIST
TEST = 360  # images, the last fifth


def draw(archive: Path) -> None:
    """Writes the digits in the layout of MNIST's four files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack([_enlarge(image) for image in digits.images])
    labels = digits.target.astype(np.uint8)
    members = {}
    for part, rows in (("train", slice(None, -TEST)), ("t10k", slice(-TEST, None))):
        members[f"mnist/{part}-images-idx3-ubyte.gz"] = _idx(images[rows])
        members[f"mnist/{part}-labels-idx1-ubyte.gz"] = _idx(labels[rows])
    write_archive(archive, members.items())


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """float [8, 8] in 0..16 -> uint8 [28, 28]."""
    small = Image.fromarray((digit * 255 / 16).round().astype(np.uint8))
    large = np.asarray(small.resize((BOX, BOX), Image.Resampling.BICUBIC))
    return np.pad(large, (SIDE - BOX) // 2)


def _idx(values: np.ndarray) -> bytes:
    """uint8 values as a gzipped IDX file without a time stamp."""
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return gzip.compress(head + values.tobytes(), compresslevel=6, mtime=0)
