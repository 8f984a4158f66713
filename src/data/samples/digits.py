"""The embedded sample of MNIST: real digits of 8x8 pixels, brought to MNIST's size and format, offline.

They are scikit-learn's: the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
1998), 1,797 digits by 13 people. Written by hand, they teach more than rendered fonts would: no two are alike.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.samples.archive import write_archive

SIDE, BOX = 28, 20  # pixels: of an image, and of the box in its middle that a digit fills, as in MNIST
TEST = 360  # the last fifth


def draw(archive: Path) -> None:
    """Writes the digits in the layout of MNIST's four files."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.stack([_enlarged(image) for image in found.images])
    labels = found.target.astype(np.uint8)
    members = {}
    for part, chosen in (("train", slice(None, -TEST)), ("t10k", slice(-TEST, None))):
        members[f"mnist/{part}-images-idx3-ubyte.gz"] = _idx(images[chosen])
        members[f"mnist/{part}-labels-idx1-ubyte.gz"] = _idx(labels[chosen])
    write_archive(archive, members.items())


def _enlarged(digit: np.ndarray) -> np.ndarray:
    """float [8, 8] in 0..16 -> uint8 [28, 28]."""
    small = Image.fromarray((digit * 255 / 16).round().astype(np.uint8))
    large = np.asarray(small.resize((BOX, BOX), Image.Resampling.BICUBIC))
    return np.pad(large, (SIDE - BOX) // 2)


def _idx(values: np.ndarray) -> bytes:
    """uint8 values as a gzipped IDX file without a date."""
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return gzip.compress(head + values.tobytes(), compresslevel=6, mtime=0)
