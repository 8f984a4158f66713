"""The embedded sample of two domains whose mapping is known: textured ground with orange blobs, or blue ringed ones.

A scene is the same in both domains but for its blobs. Their colours have red and blue exchanged in B, and dark rings
follow their outlines. The mapping depends on a pixel's colour and distance to the outline alone, so it commutes with
shifts and mirrors. No training scene occurs in both domains; test image i of A and test image i of B show the same
scene, by which a translation can be measured.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from src.common.files import replacing
from src.data.samples.archive import Floats

SIDE = 64  # pixels
COUNTS = {"trainA": 120, "trainB": 150}  # unequal, as they usually are
TEST = 40  # scenes
RING = 0.22  # width of a ring, dark or plain, in half sides of the image
DARK = 0.3  # brightness of a dark ring


def draw(archive: Path) -> None:
    """Writes the images in the layout of horse2zebra.zip."""
    seeds = np.random.default_rng(0).integers(2**32, size=sum(COUNTS.values()) + TEST).tolist()
    archive.parent.mkdir(parents=True, exist_ok=True)
    with replacing(archive) as file, zipfile.ZipFile(file, "w") as packed:
        for folder, count in COUNTS.items():
            for number in range(count):
                plain, ringed = scene(seeds.pop())
                _add(packed, folder, number, plain if folder == "trainA" else ringed)
        for number in range(TEST):
            plain, ringed = scene(seeds.pop())
            _add(packed, "testA", number, plain)
            _add(packed, "testB", number, ringed)


def _add(packed: zipfile.ZipFile, folder: str, number: int, image: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    entry = zipfile.ZipInfo(f"domains/{folder}/{number:03}.png")  # dated 1980
    packed.writestr(entry, buffer.getvalue())


def scene(seed: int) -> np.ndarray:
    """One scene in both domains, uint8 [2, SIDE, SIDE, 3]: A, B."""
    random = np.random.default_rng(seed)
    at = ((np.arange(SIDE) + 0.5) / SIDE * 2 - 1).astype(np.float32)
    x, y = at[None, :], at[:, None]
    ground = np.repeat(120 + 12 * _texture(random, x, y)[..., None], 3, axis=2)
    image = np.stack([ground, ground])
    for _ in range(random.integers(1, 3)):
        depth = _depth(random, x, y)
        colour = np.array([random.uniform(200, 240), random.uniform(120, 160), random.uniform(40, 80)], np.float32)
        opacity = _smooth(depth)[..., None]
        is_dark = _smooth(RING / 2 - np.abs((depth - RING / 2) % (2 * RING) - RING / 2))[..., None]
        exchanged = colour[::-1] * (1 - (1 - DARK) * is_dark)
        fills = np.stack([np.broadcast_to(colour, ground.shape), exchanged]).astype(np.float32)
        image = image * (1 - opacity) + fills * opacity
    return image.round().clip(0, 255).astype(np.uint8)


def _texture(random: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Waves of a few directions, in about -1..1: float [SIDE, SIDE]."""
    waves = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(4):
        angle, pitch, phase = random.uniform(0, np.pi), random.uniform(3, 12), random.uniform(0, 2 * np.pi)
        waves += np.sin(pitch * (np.cos(angle) * x + np.sin(angle) * y) + phase).astype(np.float32) / 2
    return waves


def _depth(random: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """How far inside a rounded box of random place, size and angle each pixel lies; negative outside."""
    middle_x, middle_y = random.uniform(-0.5, 0.5, 2)
    angle = random.uniform(0, np.pi)
    width, height = random.uniform(0.1, 0.4), random.uniform(0.05, 0.2)
    radius = random.uniform(0.25, 0.35)
    along = np.abs(np.cos(angle) * (x - middle_x) + np.sin(angle) * (y - middle_y)) - width
    across = np.abs(np.cos(angle) * (y - middle_y) - np.sin(angle) * (x - middle_x)) - height
    outside = np.hypot(along.clip(0), across.clip(0)) + np.minimum(np.maximum(along, across), 0)
    return (radius - outside).astype(np.float32)


def _smooth(depth: Floats) -> Floats:
    """The share of a pixel inside an outline that lies `depth` from its middle."""
    return (depth * SIDE / 2 + 0.5).clip(0, 1)
