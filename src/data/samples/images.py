"""The embedded sample of CIFAR-10: drawn images in the official archive format, offline.

The same arguments and library versions give the same bytes. The archive takes the whole real path: verify, unpack,
decode, pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from src.data.samples.archive import Colour, Floats, tint, write_archive

Point = tuple[float, float]
Bytes = npt.NDArray[np.uint8]

_CANVAS = 96  # objects are drawn at three times the size, then reduced: smooth edges

# Mean colours of sky and ground of the scenes; jittered widely per image.
_SCENES: dict[str, tuple[Colour, Colour]] = {
    "sky": ((110, 160, 215), (190, 210, 225)),
    "dusk": ((150, 120, 150), (215, 165, 120)),
    "road": ((165, 175, 185), (110, 108, 105)),
    "water": ((180, 200, 215), (70, 105, 140)),
    "meadow": ((165, 190, 205), (100, 130, 65)),
    "forest": ((70, 95, 60), (110, 105, 65)),
    "room": ((175, 160, 140), (135, 105, 80)),
}


def draw(archive: Path, *, train: int = 2500, test: int = 500, seed: int = 0) -> None:
    """Writes drawn 32x32 images of the ten CIFAR-10 classes in the layout of `cifar-10-binary.tar.gz`.

    Labels are balanced to within one image. The training images are spread over the five official batches. Position,
    size, pose, colours, background, light and noise vary within a class, and some objects are partly hidden.
    """

    def members() -> Iterator[tuple[str, bytes]]:
        folder = "cifar-10-batches-bin"
        yield f"{folder}/batches.meta.txt", "".join(f"{name}\n" for name in _OBJECTS).encode()
        batches = np.array_split(_cifar10_records(train, np.random.default_rng([seed, 0])), 5)
        for number, batch in enumerate(batches, start=1):
            yield f"{folder}/data_batch_{number}.bin", batch.tobytes()
        yield f"{folder}/test_batch.bin", _cifar10_records(test, np.random.default_rng([seed, 1])).tobytes()

    write_archive(archive, members())


class _Pen:
    """Draws shapes in the coordinates of the object: x right, y down, both about [-1, 1]."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.image = Image.new("RGBA", (_CANVAS, _CANVAS))
        self._draw = ImageDraw.Draw(self.image)
        angle, size = rng.normal(0, 0.13), _CANVAS * rng.uniform(0.27, 0.45)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        stretch = np.array([rng.choice([-1, 1]), 1]) * rng.uniform(0.85, 1.15, 2)  # mirrored or not
        self._matrix: list[list[float]] = (size * turn * stretch).tolist()
        self._centre = _CANVAS * (0.5 + rng.uniform(-0.13, 0.13, 2))
        self.foot = float(self._centre[1] + 0.6 * size) / _CANVAS  # the object's lower end, as a fraction of the height

    def shape(self, points: Iterable[Point], colour: Colour) -> None:
        """Fills a polygon."""
        (xx, xy), (yx, yy) = self._matrix
        placed = np.array([(x * xx + y * xy, x * yx + y * yy) for x, y in points]) + self._centre
        # To a sixteenth of a pixel: the last bit of a cosine, which differs between processors, moves no edge.
        self._draw.polygon((np.round(16 * placed) / 16).ravel().tolist(), fill=colour)

    def oval(self, x: float, y: float, across: float, down: float, colour: Colour) -> None:
        """Fills an ellipse about (x, y) with these half axes."""
        self.shape(((x + across * c, y + down * s) for c, s in _CIRCLE), colour)

    def stroke(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """Draws a bar between two points."""
        (x0, y0), (x1, y1) = start, end
        length = float(np.hypot(x1 - x0, y1 - y0))
        dx, dy = width / 2 * (y1 - y0) / length, width / 2 * (x1 - x0) / length
        self.shape([(x0 - dx, y0 + dy), (x0 + dx, y0 - dy), (x1 + dx, y1 - dy), (x1 - dx, y1 + dy)], colour)

    def hide(self, rng: np.random.Generator, colour: Colour) -> None:
        """Draws a post or a bush in front of the object, anywhere on the canvas."""
        x, y = rng.uniform(0, _CANVAS, 2)
        across, down = _CANVAS * rng.uniform(0.04, 0.14), _CANVAS * rng.uniform(0.08, 0.3)
        figure = self._draw.ellipse if rng.random() < 0.5 else self._draw.rectangle
        figure((x - across, y - down, x + across, y + down), fill=colour)


_CIRCLE = [(float(np.cos(a)), float(np.sin(a))) for a in np.linspace(0, 2 * np.pi, 18, endpoint=False)]


def _any_colour(rng: np.random.Generator) -> Colour:
    red, green, blue = rng.integers(25, 245, 3).tolist()
    return red, green, blue


def _fur(rng: np.random.Generator) -> Colour:
    """A brown, grey, black or white."""
    grey, warm = rng.uniform(35, 215), rng.uniform(0, 0.5)
    return int(grey * (1 + warm / 3)), int(grey), int(grey * (1 - warm))


def _airplane(pen: _Pen, rng: np.random.Generator) -> None:
    body = _any_colour(rng)
    wing, sweep = tint(body, 0.75), rng.uniform(0.2, 0.5)
    pen.shape([(0.1, -0.05), (-0.1 - sweep, -0.55), (-0.3 - sweep, -0.55), (-0.25, -0.05)], wing)
    pen.oval(0, 0, 0.95, 0.14, body)
    pen.shape([(-0.6, 0), (-0.85, -0.42), (-1.0, -0.42), (-0.92, 0)], body)
    pen.shape([(0.2, 0.03), (-0.15 - sweep, 0.65), (-0.38 - sweep, 0.65), (-0.25, 0.03)], tint(body, 0.6))
    pen.stroke((-0.5, -0.04), (0.8, -0.04), 0.06, tint(body, 0.35))


def _automobile(pen: _Pen, rng: np.random.Generator) -> None:
    body, back = _any_colour(rng), rng.uniform(-0.75, -0.5)
    pen.shape([(back, 0.02), (back + 0.2, -0.4), (0.25, -0.4), (0.55, 0.02)], body)
    pen.shape([(back + 0.1, -0.02), (back + 0.25, -0.32), (-0.15, -0.32), (-0.15, -0.02)], (60, 75, 90))
    pen.shape([(-0.08, -0.02), (-0.08, -0.32), (0.2, -0.32), (0.42, -0.02)], (60, 75, 90))
    pen.shape([(-0.95, 0.02), (0.7, -0.02), (0.95, 0.1), (0.95, 0.38), (-0.95, 0.38)], tint(body, 0.85))
    for x in (-0.55, 0.55):
        pen.oval(x, 0.38, 0.23, 0.23, (25, 25, 28))
        pen.oval(x, 0.38, 0.1, 0.1, (150, 150, 155))


def _bird(pen: _Pen, rng: np.random.Generator) -> None:
    body = tint(_any_colour(rng), 0.8)
    pen.shape([(-0.35, 0.05), (-1.0, 0.1), (-1.0, 0.32), (-0.3, 0.25)], tint(body, 0.6))
    pen.oval(-0.05, 0.08, 0.48, 0.3, body)
    pen.oval(0.42, -0.22, 0.22, 0.21, body)
    pen.shape([(0.6, -0.3), (0.92, -0.18), (0.6, -0.12)], (225, 160, 40))
    pen.oval(0.48, -0.27, 0.05, 0.05, (10, 10, 10))
    if rng.random() < 0.5:  # in flight
        pen.shape([(0.2, 0), (-0.1, -0.85), (-0.5, -0.7), (-0.3, 0.1)], tint(body, 0.7))
    else:
        pen.shape([(0.15, 0), (-0.1, 0.25), (-0.55, 0.22), (-0.3, 0)], tint(body, 0.65))
        for x in (-0.05, 0.1):
            pen.stroke((x, 0.35), (x, 0.62), 0.06, (200, 140, 50))


def _cat(pen: _Pen, rng: np.random.Generator) -> None:
    """A sitting cat seen from the front: round head, pointed ears, a tail."""
    fur = _fur(rng)
    dark = tint(fur, 0.6)
    pen.stroke((0.3, 0.5), (0.75, 0.3), 0.16, dark)
    pen.stroke((0.75, 0.34), (0.8, -0.1), 0.15, dark)
    pen.oval(0, 0.3, 0.42, 0.42, fur)
    for side in (-1, 1):
        pen.shape([(side * 0.42, -0.3), (side * 0.38, -0.9), (side * 0.08, -0.55)], dark)
    pen.oval(0, -0.3, 0.44, 0.37, fur)
    if rng.random() < 0.5:  # a tabby
        for y in (0.15, 0.32, 0.49):
            pen.stroke((-0.35, y), (0.35, y), 0.06, dark)
    for side in (-1, 1):
        pen.oval(side * 0.18, -0.33, 0.08, 0.08, (190, 200, 70))
        pen.stroke((side * 0.15, -0.12), (side * 0.5, -0.15), 0.04, (235, 235, 235))
    pen.oval(0, -0.17, 0.07, 0.05, (200, 110, 110))


def _legs(
    pen: _Pen, rng: np.random.Generator, colour: Colour, front: float, back: float, top: float, width: float
) -> None:
    """Four legs in a random phase of the stride, down to y = 0.75."""
    for x, shade in ((front, 0.65), (back, 0.65), (front - 0.1, 0.9), (back + 0.1, 0.9)):
        pen.stroke((x, top), (x + rng.normal(0, 0.08), 0.75), width, tint(colour, shade))


def _deer(pen: _Pen, rng: np.random.Generator) -> None:
    fur: Colour = tint((165, 115, 70), rng.uniform(0.6, 1.25))
    horn = tint(fur, 0.45) if rng.random() < 0.5 else (215, 200, 170)
    _legs(pen, rng, fur, 0.32, -0.5, 0.2, 0.09)
    pen.oval(-0.1, 0.12, 0.52, 0.22, fur)
    pen.oval(-0.6, 0.05, 0.09, 0.1, (240, 235, 225))
    pen.shape([(0.12, 0.1), (0.42, 0.15), (0.62, -0.38), (0.45, -0.42)], fur)
    pen.shape([(0.42, -0.5), (0.62, -0.5), (0.95, -0.27), (0.88, -0.2), (0.5, -0.28)], fur)
    for lean in (-0.25, 0.12):
        pen.stroke((0.52, -0.48), (0.5 + lean, -0.98), 0.07, horn)
        pen.stroke((0.5 + lean / 2, -0.75), (0.7 + lean / 2, -0.92), 0.06, horn)


def _dog(pen: _Pen, rng: np.random.Generator) -> None:
    fur = _fur(rng)
    _legs(pen, rng, fur, 0.35, -0.45, 0.25, 0.16)
    pen.stroke((-0.55, 0.1), (-0.9, -0.35), 0.11, fur)
    pen.oval(-0.08, 0.18, 0.56, 0.26, fur)
    if rng.random() < 0.5:  # a patch
        pen.oval(-0.2, 0.1, 0.2, 0.14, tint(fur, 0.5))
    pen.shape([(0.2, 0.1), (0.5, 0.25), (0.65, -0.2), (0.35, -0.3)], fur)
    pen.oval(0.48, -0.3, 0.27, 0.25, fur)
    pen.shape([(0.55, -0.38), (0.95, -0.28), (0.95, -0.1), (0.55, -0.1)], tint(fur, 1.1))
    pen.oval(0.93, -0.23, 0.07, 0.06, (15, 15, 15))
    pen.oval(0.32, -0.18, 0.11, 0.25, tint(fur, 0.5))
    pen.oval(0.58, -0.36, 0.05, 0.05, (10, 10, 10))


def _frog(pen: _Pen, rng: np.random.Generator) -> None:
    skin = tint((105, 150, 55), rng.uniform(0.55, 1.3)) if rng.random() < 0.6 else _fur(rng)
    dark = tint(skin, 0.65)
    for side in (-1, 1):
        pen.oval(side * 0.62, 0.32, 0.32, 0.24, dark)
        pen.stroke((side * 0.55, 0.52), (side * 0.98, 0.56), 0.1, dark)
    pen.oval(0, 0.2, 0.62, 0.4, skin)
    pen.oval(0, 0.38, 0.45, 0.22, tint(skin, 1.35))
    for side in (-1, 1):
        pen.oval(side * 0.32, -0.22, 0.2, 0.2, skin)
        pen.oval(side * 0.32, -0.24, 0.12, 0.12, (235, 215, 90))
        pen.oval(side * 0.32, -0.24, 0.05, 0.08, (10, 10, 10))
        pen.stroke((side * 0.28, 0.4), (side * 0.34, 0.66), 0.12, dark)
    pen.stroke((-0.4, 0.12), (0.4, 0.12), 0.05, tint(skin, 0.4))


def _horse(pen: _Pen, rng: np.random.Generator) -> None:
    coat = _fur(rng)
    mane = tint(coat, 0.45) if sum(coat) > 200 else (190, 175, 150)
    _legs(pen, rng, coat, 0.35, -0.52, 0.15, 0.14)
    pen.shape([(-0.6, -0.1), (-0.85, 0), (-0.95, 0.55), (-0.75, 0.5), (-0.62, 0.1)], mane)
    pen.oval(-0.08, 0.02, 0.6, 0.29, coat)
    pen.shape([(0.08, 0), (0.48, 0.12), (0.72, -0.55), (0.45, -0.72)], coat)
    pen.shape([(0.48, -0.8), (0.68, -0.75), (1.0, -0.35), (0.85, -0.22), (0.55, -0.45)], coat)
    pen.shape([(0.05, -0.15), (0.35, -0.75), (0.55, -0.85), (0.5, -0.6), (0.3, -0.1)], mane)


def _ship(pen: _Pen, rng: np.random.Generator) -> None:
    hull, deck = _any_colour(rng), tint((225, 225, 220), rng.uniform(0.7, 1.1))
    if rng.random() < 0.4:  # under sail
        pen.stroke((0, 0.3), (0, -0.95), 0.07, (90, 65, 45))
        pen.shape([(0.07, -0.9), (0.07, 0.15), (0.7, 0.15)], deck)
        pen.shape([(-0.07, -0.75), (-0.07, 0.15), (-0.55, 0.15)], tint(deck, 0.85))
    else:
        pen.shape([(-0.6, 0.25), (-0.6, -0.12), (0.45, -0.12), (0.5, 0.25)], deck)
        pen.shape([(-0.45, -0.1), (-0.45, -0.4), (0.15, -0.4), (0.2, -0.1)], tint(deck, 0.85))
        pen.shape([(-0.3, -0.38), (-0.3, -0.8), (-0.08, -0.8), (-0.08, -0.38)], _any_colour(rng))
        for x in (-0.45, -0.2, 0.05, 0.3):
            pen.oval(x, 0.06, 0.06, 0.06, (50, 60, 75))
    pen.shape([(-0.92, 0.2), (1.0, 0.12), (0.72, 0.6), (-0.75, 0.6)], hull)


def _truck(pen: _Pen, rng: np.random.Generator) -> None:
    load, cab = _any_colour(rng), _any_colour(rng)
    pen.shape([(-0.98, 0.35), (-0.98, -0.55), (0.35, -0.55), (0.35, 0.35)], load)
    if rng.random() < 0.5:
        pen.stroke((-0.9, -0.15), (0.28, -0.15), 0.14, tint(load, 1.4))
    pen.shape([(0.42, 0.4), (0.42, -0.3), (0.75, -0.3), (0.97, 0.02), (0.97, 0.4)], cab)
    pen.shape([(0.52, 0.02), (0.52, -0.22), (0.72, -0.22), (0.87, 0.02)], (60, 75, 90))
    pen.stroke((-0.95, 0.4), (0.95, 0.4), 0.1, (50, 50, 52))
    for x in (-0.7, -0.35, 0.68):
        pen.oval(x, 0.45, 0.18, 0.18, (25, 25, 28))
        pen.oval(x, 0.45, 0.07, 0.07, (150, 150, 155))


# The ten classes in the official order: their drawing function and their scenes.
_OBJECTS: dict[str, tuple[Callable[[_Pen, np.random.Generator], None], tuple[str, ...]]] = {
    "airplane": (_airplane, ("sky", "dusk", "road", "meadow")),
    "automobile": (_automobile, ("road", "dusk", "meadow")),
    "bird": (_bird, ("sky", "forest", "meadow", "water")),
    "cat": (_cat, ("room", "meadow", "road")),
    "deer": (_deer, ("forest", "meadow", "dusk")),
    "dog": (_dog, ("room", "meadow", "road")),
    "frog": (_frog, ("water", "forest", "meadow")),
    "horse": (_horse, ("meadow", "dusk", "road")),
    "ship": (_ship, ("water", "dusk", "sky")),
    "truck": (_truck, ("road", "dusk", "meadow")),
}


def _cifar10_records(count: int, rng: np.random.Generator) -> Bytes:
    """Records of CIFAR-10's binary version: uint8 (count, 3073), the label, then red, green and blue planes."""
    labels = rng.permutation(np.arange(count) % len(_OBJECTS))
    objects = list(_OBJECTS.values())
    layers = np.empty((count, 32, 32, 4), np.float32)
    grounds = np.empty((count, 2, 3), np.float32)
    feet = np.empty(count, np.float32)
    for index, label in enumerate(labels):
        draw_object, scenes = objects[label]
        pen = _Pen(rng)
        draw_object(pen, rng)
        grounds[index] = _SCENES[scenes[rng.integers(len(scenes))]]
        if rng.random() < 0.5:
            pen.hide(rng, _any_colour(rng))
        layers[index] = np.asarray(pen.image.reduce(_CANVAS // 32))
        feet[index] = pen.foot

    rows = np.linspace(0, 1, 32, dtype=np.float32)[None, :, None, None]
    grounds += rng.normal(0, 30, (count, 2, 1)) + rng.normal(0, 14, (count, 2, 3))
    sky, ground = grounds[:, None, None, 0], grounds[:, None, None, 1]
    horizon = (feet + rng.normal(-0.2, 0.12, count).astype(np.float32))[:, None, None, None]
    scene = np.where(rows < horizon, sky * (1.15 - 0.3 * rows), ground * (0.7 + 0.4 * rows))
    scene = scene + 20 * _blotches(rng, count, 5) + 16 * _blotches(rng, count, 16)
    opacity = layers[..., 3:] / 255
    image = scene * (1 - opacity) + (layers[..., :3] + 14 * _blotches(rng, count, 16)) * opacity
    contrast = rng.uniform(0.55, 1.15, (count, 1, 1, 1)).astype(np.float32)
    light = (rng.normal(122, 22, (count, 1, 1, 1)) + rng.normal(0, 12, (count, 1, 1, 3))).astype(np.float32)
    image = light + contrast * (image - 128) + 9 * rng.standard_normal(image.shape, np.float32)
    planes = image.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2).reshape(count, -1)
    return np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1)


def _blotches(rng: np.random.Generator, count: int, cells: int) -> Floats:
    """Smooth grey texture for 32x32 images, (count, 32, 32, 1): noise on a grid of `cells` points a side, interpolated.

    Element by element, since the last bit of a matrix product differs between processors.
    """
    noise: Floats = rng.standard_normal((count, cells, cells, 1), np.float32)
    at = np.linspace(0, cells - 1, 32, dtype=np.float32)
    low = np.minimum(at.astype(int), cells - 2)
    along = (at - low).astype(np.float32)[:, None]
    noise = noise[:, :, low] * (1 - along) + noise[:, :, low + 1] * along
    along = along[:, None]
    noise = noise[:, low] * (1 - along) + noise[:, low + 1] * along
    return noise
