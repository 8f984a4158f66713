"""The embedded sample of facades: drawn pairs in pix2pix's archive format, offline.

The same arguments and library versions give the same bytes. The archive takes the whole real path: verify, unpack,
decode, pack.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from src.data.samples.archive import Colour, Floats, tint, write_archive
from src.data.sets.facade_palette import FACADE_PALETTE

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded

_SIDE = 256
_FINE = 2  # the photo is drawn at twice the size, then reduced

_Part = tuple[str, Box]  # a class of FACADE_PALETTE and where it lies; later parts cover earlier ones

# How far a part protrudes from the wall, in pixels of shadow.
_RELIEF = {"balcony": 7, "cornice": 4, "molding": 4, "pillar": 4, "deco": 3, "sill": 3}


def draw(archive: Path, *, train: int = 120, val: int = 20, test: int = 24, seed: int = 0) -> None:
    """Writes drawn facades in the layout of pix2pix's `facades.tar.gz`.

    Each image is a 512x256 JPEG: the photo on the left, its label map in the colours of `FACADE_PALETTE` on the right.
    The photo follows from the map and from a style of the building: materials, colours, light.
    """

    def members() -> Iterator[tuple[str, bytes]]:
        for key, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
            for number in range(1, count + 1):
                rng = np.random.default_rng([seed, key, number])
                parts = _lay_out(rng)
                pair = Image.new("RGB", (2 * _SIDE, _SIDE))
                pair.paste(_photograph(parts, rng), (0, 0))
                pair.paste(_label_map(parts), (_SIDE, 0))
                encoded = io.BytesIO()
                pair.save(encoded, "JPEG", quality=90)
                yield f"facades/{split}/{number}.jpg", encoded.getvalue()

    write_archive(archive, members())


def _lay_out(rng: np.random.Generator) -> list[_Part]:
    """Designs a facade: storeys of windows and ornaments over a ground floor, with a margin around the house.

    The first part is the background, the second the wall of the house.
    """
    left, right = int(rng.integers(0, 36)), _SIDE - int(rng.integers(0, 36))
    roof, street = int(rng.integers(6, 48)), _SIDE - int(rng.integers(8, 26))
    storeys = int(rng.integers(3, 6))
    bays = int(rng.integers(4, 8))
    storey = (street - roof) / (storeys + 0.3)  # the ground floor is the higher one
    bay = (right - left) / bays
    twins = bays < 7 and rng.random() < 0.35  # two narrow windows a bay
    height = storey * rng.uniform(0.46, 0.6)
    width = min(bay * rng.uniform(0.42, 0.6), height * rng.uniform(0.6, 0.85) * (1.8 if twins else 1))
    sills, cornices, shutters, blinds, moldings, decos = rng.random(6) < (0.8, 0.55, 0.25, 0.4, 0.75, 0.35)
    pillars = rng.choice(["none", "corners", "bays"], p=[0.5, 0.3, 0.2])
    balconies = rng.random(bays) < 0.3 if rng.random() < 0.6 else np.zeros(bays, bool)

    parts: list[_Part] = [("background", (0, 0, _SIDE, _SIDE)), ("facade", (left, roof, right, street))]

    def add(label: str, x0: float, y0: float, x1: float, y1: float) -> None:
        parts.append((label, (round(max(x0, 0)), round(max(y0, 0)), round(min(x1, _SIDE)), round(min(y1, _SIDE)))))

    def windows(middle: float, top: float) -> None:
        pane = width * 0.42 if twins else width
        for x0 in [middle - width / 2, middle + width / 2 - pane] if twins else [middle - width / 2]:
            add("window", x0, top, x0 + pane, top + height)
            if blinds and rng.random() < 0.4:
                add("blind", x0, top, x0 + pane, top + height * rng.uniform(0.25, 0.8))

    def sill(middle: float, top: float) -> None:
        add("sill", middle - width * 0.6, top, middle + width * 0.6, top + max(storey * 0.08, 3))

    ground = roof + (storeys - 1) * storey
    if pillars != "none":
        edges = [0, bays] if pillars == "corners" else range(bays + 1)
        thick = bay * rng.uniform(0.1, 0.18)
        for edge in edges:
            x = min(max(left + edge * bay - thick / 2, left), right - thick)
            add("pillar", x, roof + 4, x + thick, ground)
    for floor, column in itertools.product(range(storeys - 1), range(bays)):
        middle, top = left + (column + 0.5) * bay, roof + (floor + 0.28) * storey
        x0, x1 = middle - width / 2, middle + width / 2
        windows(middle, top)
        if shutters:
            add("blind", x0 - width * 0.3, top, x0, top + height)
            add("blind", x1, top, x1 + width * 0.3, top + height)
        if cornices:
            add("cornice", x0 - width * 0.12, top - storey * 0.14, x1 + width * 0.12, top - storey * 0.03)
        if balconies[column] and floor:
            add("balcony", x0 - width * 0.25, top + height * 0.5, x1 + width * 0.25, top + height * 1.12)
        elif sills:
            sill(middle, top + height)
        if decos and floor == 0 and column < bays - 1 and pillars != "bays":
            add("deco", middle + bay * 0.4, top + height * 0.2, middle + bay * 0.6, top + height * 0.7)
    if moldings:
        add("molding", left, roof, right, roof + storey * 0.13)
        add("molding", left, ground - storey * 0.03, right, ground + storey * 0.08)

    entrance, shops = int(rng.integers(bays)), rng.random() < 0.6
    for column in range(bays):
        middle, top = left + (column + 0.5) * bay, ground + storey * 0.32
        if column == entrance:
            add("door", middle - bay * 0.24, top, middle + bay * 0.24, street)
        elif shops:
            add("shop", middle - bay * 0.42, top - storey * 0.1, middle + bay * 0.42, street - storey * 0.12)
        else:
            windows(middle, top)
            if sills:
                sill(middle, top + height)
    return parts


def _label_map(parts: list[_Part]) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE))
    draw = ImageDraw.Draw(image)
    for label, (x0, y0, x1, y1) in parts:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=FACADE_PALETTE[label])
    return image


@dataclass(frozen=True)
class _Style:
    """The materials of one house."""

    wall: Colour
    stone: Colour
    frame: Colour
    glass: Colour
    wood: Colour
    cloth: Colour
    roof: Colour
    bricks: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Style:
        walls = [(205, 180, 135), (222, 208, 176), (178, 104, 82), (168, 160, 150), (206, 150, 118), (150, 166, 150)]
        wall = tint(walls[rng.integers(len(walls))], rng.uniform(0.85, 1.1))
        return cls(
            wall=wall,
            stone=tint(wall, 1.25) if rng.random() < 0.5 else tint((215, 208, 195), rng.uniform(0.85, 1.05)),
            frame=tint((240, 238, 230), rng.uniform(0.9, 1.05)) if rng.random() < 0.75 else (84, 58, 42),
            glass=tint((62, 78, 96), rng.uniform(0.7, 1.2)),
            wood=[(104, 66, 42), (62, 84, 66), (70, 74, 92), (128, 52, 44)][rng.integers(4)],
            cloth=[(176, 50, 44), (52, 96, 74), (208, 164, 72), (58, 76, 120)][rng.integers(4)],
            roof=[(142, 76, 58), (92, 88, 88), (112, 84, 70)][rng.integers(3)],
            bricks=bool(rng.random() < 0.5),
        )


def _photograph(parts: list[_Part], rng: np.random.Generator) -> Image.Image:
    """Renders the map as a house in a street, 256x256."""
    style = _Style.draw(rng)
    _, house = parts[1]
    canvas = _street(house, style, rng).resize((_FINE * _SIDE, _FINE * _SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for label, (x0, y0, x1, y1) in parts[2:]:
        _BUILDERS[label](draw, (_FINE * x0, _FINE * y0, _FINE * x1 - 1, _FINE * y1 - 1), style)
    photo = np.asarray(canvas.reduce(_FINE), np.float32)
    photo *= 1 - 0.5 * _shadows(parts)[..., None]
    slope = np.linspace(-1, 1, _SIDE, dtype=np.float32)
    photo *= rng.uniform(0.9, 1.06) + rng.uniform(-0.12, 0.12) * slope[None, :, None] - 0.07 * slope[:, None, None]
    photo *= rng.normal(1, 0.03, 3).astype(np.float32)  # the colour of the light
    photo += 3 * rng.standard_normal((_SIDE, _SIDE, 1), np.float32)
    return Image.fromarray(photo.clip(0, 255).astype(np.uint8))


def _street(house: Box, style: _Style, rng: np.random.Generator) -> Image.Image:
    """The bare wall of the house among sky, neighbours and pavement, 256x256."""
    left, top, right, bottom = house
    height = np.linspace(0, 1, _SIDE, dtype=np.float32)[:, None, None]
    blue, clouds = np.array([[120, 160, 205], [185, 195, 205]], np.float32)[rng.integers(2)], _clouds(rng, 6)
    air = blue + (225 - blue) * (0.3 + 0.7 * height) + 12 * clouds
    image = Image.fromarray(air.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x0, x1 in ((0, left), (right, _SIDE)):
        hazy = tint((190, 182, 172), rng.uniform(0.75, 1.1))
        eaves = int(np.clip(top + rng.integers(-20, 60), 4, bottom - 40))
        draw.rectangle((x0, eaves, x1, bottom), fill=hazy)
        draw.rectangle((x0, eaves, x1, eaves + 3), fill=tint(hazy, 0.75))
        for y in range(eaves + 14, bottom - 20, 30):
            for x in range(x0 + 5, x1 - 8, 16):
                draw.rectangle((x, y, x + 7, y + 14), fill=tint(hazy, 0.6))
    draw.polygon([(left, top), (left + 12, top - 16), (right - 12, top - 16), (right, top)], fill=style.roof)
    draw.rectangle((0, bottom, _SIDE, _SIDE), fill=(138, 134, 130))
    draw.rectangle((0, bottom + 6, _SIDE, _SIDE), fill=(96, 95, 96))

    pixels = np.asarray(image, np.float32).copy()
    wall = pixels[top:bottom, left:right]
    wall[:] = style.wall
    wall += 5 * _clouds(rng, 10)[top:bottom, left:right]
    if style.bricks:
        down, across = np.indices(wall.shape[:2])
        course = down // 4
        across = across + 4 * (course % 2)  # every other course is set off by half a brick
        tones = rng.standard_normal((_SIDE // 4, _SIDE // 8 + 1), np.float32)
        wall += 9 * tones[course, across // 8][..., None]
        wall[(down % 4 == 0) | (across % 8 == 0)] *= 0.88  # mortar
    pixels[bottom:] += 4 * rng.standard_normal((_SIDE - bottom, _SIDE, 1), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _clouds(rng: np.random.Generator, cells: int) -> Floats:
    """Smooth grey texture of about unit variance, (256, 256, 1), with features of 256 / cells pixels."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))[..., None]


def _shadows(parts: list[_Part]) -> Floats:
    """Depth of shadow, (256, 256) in [0, 1]: protruding parts darken their lower right."""
    mask = Image.new("L", (_SIDE, _SIDE))
    draw = ImageDraw.Draw(mask)
    protruding = [(box, _RELIEF[label]) for label, box in parts if label in _RELIEF]
    for (x0, y0, x1, y1), depth in protruding:
        draw.rectangle((x0 + depth // 2, y0 + depth // 2, x1 - 1 + depth // 2, y1 - 1 + depth), fill=255)
    soft = mask.filter(ImageFilter.GaussianBlur(1))
    draw = ImageDraw.Draw(soft)
    for (x0, y0, x1, y1), _ in protruding:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=0)
    return np.asarray(soft, np.float32) / np.float32(255)


def _window(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    x0, y0, x1, y1 = box
    middle, bar = (x0 + x1) // 2, y0 + (y1 - y0) // 3
    draw.rectangle(box, fill=style.frame)
    pane = (x0 + 4, y0 + 4, x1 - 4, y1 - 4)
    draw.rectangle(pane, fill=style.glass)
    # The sky in the upper part of the glass, cut off aslant.
    draw.polygon(
        [pane[:2], (pane[2], pane[1]), (pane[2], bar), (pane[0], (bar + y1) // 2)], fill=tint(style.glass, 1.55)
    )
    draw.rectangle((x0 + 4, y0 + 4, x1 - 4, y0 + 7), fill=tint(style.glass, 0.5))  # the lintel's shadow
    draw.rectangle((x0 + 4, bar, x1 - 4, bar + 2), fill=style.frame)
    draw.rectangle((middle - 1, y0 + 4, middle + 1, y1 - 4), fill=style.frame)


def _blind(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    x0, y0, x1, y1 = box
    draw.rectangle(box, fill=style.wood)
    for y in range(y0 + 2, y1, 5):
        draw.line((x0 + 1, y, x1 - 1, y), fill=tint(style.wood, 1.45), width=2)
    draw.rectangle(box, outline=tint(style.wood, 0.7), width=1)


def _stone(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    """A ledge: lit above, dark below."""
    x0, y0, x1, y1 = box
    draw.rectangle(box, fill=style.stone)
    draw.line((x0, y0 + 1, x1, y0 + 1), fill=tint(style.stone, 1.15), width=2)
    draw.line((x0, y1 - 1, x1, y1 - 1), fill=tint(style.stone, 0.65), width=2)


def _molding(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    """A ledge with a row of dentils."""
    x0, y0, x1, y1 = box
    _stone(draw, box, style)
    for x in range(x0 + 3, x1 - 5, 12):
        draw.rectangle((x, (y0 + y1) // 2, x + 5, y1 - 3), fill=tint(style.stone, 0.78))


def _pillar(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    """Round: shaded towards its sides, between a capital and a base."""
    x0, y0, x1, y1 = box
    for x in range(x0, x1 + 1):
        draw.line((x, y0, x, y1), fill=tint(style.stone, 1.12 - 0.45 * abs(2 * (x - x0) / (x1 - x0) - 0.8)))
    _stone(draw, (x0, y0, x1, y0 + 9), style)
    _stone(draw, (x0, y1 - 9, x1, y1), style)


def _balcony(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    """An iron railing on a slab of stone."""
    x0, y0, x1, y1 = box
    iron, slab = (44, 44, 48), max(y1 - (y1 - y0) // 5, y0)
    for x in range(x0, x1, 6):
        draw.line((x, y0, x, slab), fill=iron, width=2)
    for y in (y0, (y0 + slab) // 2):
        draw.rectangle((x0, y, x1, y + 2), fill=iron)
    _stone(draw, (x0, slab, x1, y1), style)


def _deco(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    """A relief: a medallion in a frame."""
    x0, y0, x1, y1 = box
    draw.rectangle(box, fill=style.stone, outline=tint(style.stone, 0.75), width=2)
    inset = min(x1 - x0, y1 - y0) // 6
    draw.ellipse((x0 + inset, y0 + inset, x1 - inset, y1 - inset), fill=tint(style.stone, 0.78))
    draw.ellipse((x0 + 2 * inset, y0 + 2 * inset, x1 - 2 * inset, y1 - 2 * inset), fill=tint(style.stone, 1.1))


def _door(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    """Two panelled leaves below a fanlight."""
    x0, y0, x1, y1 = box
    light, middle = y0 + (y1 - y0) // 4, (x0 + x1) // 2
    draw.rectangle(box, fill=style.stone)
    draw.rectangle((x0 + 4, y0 + 4, x1 - 4, y1), fill=style.wood)
    draw.rectangle((x0 + 7, y0 + 7, x1 - 7, light), fill=tint(style.glass, 0.9))
    draw.line((middle, y0 + 4, middle, y1), fill=tint(style.wood, 0.5), width=2)
    for a, b in ((x0 + 9, middle - 5), (middle + 5, x1 - 9)):
        for y, end in ((light + 6, (light + y1) // 2), ((light + y1) // 2 + 5, y1 - 6)):
            if b > a and end > y:
                draw.rectangle((a, y, b, end), fill=tint(style.wood, 0.8), outline=tint(style.wood, 1.35))


def _shop(draw: ImageDraw.ImageDraw, box: Box, style: _Style) -> None:
    """A lit show window under a striped awning."""
    x0, y0, x1, y1 = box
    awning = y0 + (y1 - y0) // 3
    draw.rectangle(box, fill=tint(style.wood, 0.7))
    draw.rectangle((x0 + 5, awning, x1 - 5, y1 - 8), fill=tint(style.glass, 0.8))
    draw.polygon(
        [(x0 + 5, y1 - 8), (x0 + 5, awning + 8), ((x0 + x1) // 2, awning), (x0 + 18, y1 - 8)],
        fill=tint(style.glass, 1.35),
    )
    draw.line(((x0 + x1) // 2, awning, (x0 + x1) // 2, y1 - 8), fill=tint(style.wood, 0.9), width=3)
    for number, x in enumerate(range(x0, x1, 8)):
        draw.rectangle((x, y0, min(x + 7, x1), awning), fill=style.cloth if number % 2 else (228, 222, 212))
    draw.rectangle((x0, awning - 2, x1, awning), fill=tint(style.cloth, 0.6))


_BUILDERS: dict[str, Callable[[ImageDraw.ImageDraw, Box, _Style], None]] = {
    "window": _window,
    "door": _door,
    "cornice": _stone,
    "sill": _stone,
    "balcony": _balcony,
    "blind": _blind,
    "deco": _deco,
    "molding": _molding,
    "pillar": _pillar,
    "shop": _shop,
}
