"""The embedded sample of detection: drawn scenes of simple shapes in COCO's layout, offline.

The same arguments and library versions give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from src.data.samples.archive import write_archive

CLASSES = ("disc", "square", "triangle")
_COLOURS = ((200, 80, 60), (70, 90, 200), (80, 170, 70))  # about which those of a class are drawn
_FINE = 2  # drawn at twice the size, then reduced
_MOST = 6  # objects in a scene


def draw(archive: Path, *, train: int = 256, val: int = 48, test: int = 64, seed: int = 0) -> None:
    """Writes scenes of 0 to 6 discs, squares and triangles, each class of about one colour, that may cover each other.

    `scenes/{train,val,test}/*.png` and `scenes/annotations/scenes_{train,val,test}.json`. A box is that of the visible
    shape; one that is covered by more than 70 % is not annotated.
    """

    def members() -> Iterator[tuple[str, bytes]]:
        for key, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
            rows: dict[str, list[Any]] = {
                "images": [],
                "annotations": [],
                "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)],
            }
            for number in range(1, count + 1):
                rng = np.random.default_rng([seed, key, number])
                picture, objects = _scene(rng)
                width, height = picture.size
                name = f"{number:04}.png"
                rows["images"].append({"id": number, "file_name": name, "width": width, "height": height})
                for label, (x0, y0, x1, y1), area in objects:
                    rows["annotations"].append(
                        {
                            "id": len(rows["annotations"]) + 1,
                            "image_id": number,
                            "category_id": label + 1,
                            "bbox": [x0, y0, x1 - x0, y1 - y0],
                            "area": area,
                            "iscrowd": 0,
                        }
                    )
                encoded = io.BytesIO()
                picture.save(encoded, "PNG")
                yield f"scenes/{split}/{name}", encoded.getvalue()
            yield f"scenes/annotations/scenes_{split}.json", json.dumps(rows).encode()

    write_archive(archive, members())


def _scene(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int], int]]]:
    """A picture, and each object's class, visible box (right and bottom excluded) and visible pixels."""
    width, height = [(128, 96), (96, 128), (112, 112)][rng.integers(3)]
    ground = _ground(rng, width, height)
    canvas = ground.resize((_FINE * width, _FINE * height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    owner = Image.new("L", canvas.size)  # the number of the object that is seen at each pixel; 0: none
    marker = ImageDraw.Draw(owner)
    labels, areas = [], []
    for number in range(1, int(rng.integers(0, _MOST + 1)) + 1):
        label = int(rng.integers(len(CLASSES)))
        radius = _FINE * float(np.exp(rng.uniform(math.log(10), math.log(28))))
        x, y = (float(rng.uniform(0.7 * radius, side - 0.7 * radius)) for side in canvas.size)
        colour = np.clip(np.array(_COLOURS[label]) + rng.normal(0, 30, 3), 0, 255).astype(int)
        fill = (int(colour[0]), int(colour[1]), int(colour[2]))
        turn = float(rng.uniform(0, math.tau))
        alone = Image.new("L", canvas.size)
        for target, value in ((pen, fill), (marker, number), (ImageDraw.Draw(alone), 1)):
            _shape(target, label, x, y, radius, turn, value)
        labels.append(label)
        areas.append(int(np.asarray(alone).sum()))
    seen = np.asarray(owner)
    objects = []
    for number, (label, full) in enumerate(zip(labels, areas, strict=True), 1):
        rows, columns = np.nonzero(seen == number)
        if len(rows) < 0.3 * full:
            continue
        box = [
            int(columns.min()) // _FINE,
            int(rows.min()) // _FINE,
            -(-(int(columns.max()) + 1) // _FINE),
            -(-(int(rows.max()) + 1) // _FINE),
        ]
        objects.append((label, (box[0], box[1], box[2], box[3]), len(rows) // _FINE**2))
    pixels = np.asarray(canvas.reduce(_FINE), np.float32) + 6 * rng.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


def _ground(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft clouds around a grey."""
    coarse = rng.uniform(90, 190) + 20 * rng.standard_normal((6, 6, 3))
    clouds = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    return clouds.resize((width, height), Image.Resampling.BICUBIC)


def _shape(pen: ImageDraw.ImageDraw, label: int, x: float, y: float, radius: float, turn: float, fill: Any) -> None:
    if CLASSES[label] == "disc":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    corners = 4 if CLASSES[label] == "square" else 3
    angles = [turn + math.tau * corner / corners for corner in range(corners)]
    pen.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=fill)
