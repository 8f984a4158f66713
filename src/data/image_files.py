"""Decodes and resizes image files: one way for packing, predict and every other place that reads one. No torch.

A picture is decoded as people see it: turned as its EXIF data say, 16-bit grey scaled to 8 bits, transparency shown on
a background, the first frame of an animation.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from src.configuration.schema import Fit
from src.data.fetching.files import SourceError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")  # of these suffixes; some others start programs
WHITE = "white"
ORIENTATION = 0x0112  # the EXIF tag
# What brings a picture upright, by the value of the tag: names in PIL.Image.Transpose.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ACROSS = (5, 6, 7, 8)  # those that exchange width and height


class ImageError(SourceError):
    """An image file that can't be used: its name, the reason, and the remedy in the message."""

    def __init__(self, name: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"{name} {reason}{remedy and ': '}{remedy}")
        self.name = name
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageError, (self.name, self.reason, self.remedy)


class ImageFile(NamedTuple):
    """An opened image file, upright and in 8 bits, RGB or grey; and the mode that Pillow names for the file."""

    picture: Picture
    mode: str


def open_image(content: bytes, name: str, *, channels: int = 3, background: str = WHITE) -> ImageFile:
    """Decodes an image file.

    Raises:
        ImageError: naming the image that can't be decoded, or has more pixels than Pillow allows (179 million).
    """
    from PIL import Image

    with _image_errors(name):
        image: Picture = Image.open(io.BytesIO(content), formats=FORMATS)
        mode = image.mode
        if turn := _UPRIGHT.get(image.getexif().get(ORIENTATION, 1)):
            image = image.transpose(Image.Transpose[turn])
        image = _opaque(_in_8_bits(image), background)
        target = "RGB" if channels == 3 else "L"
        if image.mode != target:
            image = image.convert(target)
        image.load()
        return ImageFile(image, mode)


def image_size(content: bytes, name: str) -> tuple[int, int]:
    """Width and height of an image file as `open_image` has them, from its header.

    Raises:
        ImageError: as `open_image`, but for damage behind the header.
    """
    from PIL import Image

    with _image_errors(name), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        is_turned = image.getexif().get(ORIENTATION, 1) in _ACROSS
    return (height, width) if is_turned else (width, height)


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Turns what Pillow raises on damaged files into an ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise ImageError(name, f"can't be read as an image: it is none of {', '.join(FORMATS)}") from None
    except (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise ImageError(name, f"can't be read as an image ({error})", "remove or replace it") from None


def decode(content: bytes, name: str, *, channels: int = 3, background: str = WHITE) -> np.ndarray:
    """An image file as uint8 [H, W, C], RGB or grey.

    Raises:
        ImageError: as `open_image`.
    """
    pixels = np.asarray(open_image(content, name, channels=channels, background=background).picture)
    return pixels.reshape(*pixels.shape[:2], channels)


def fitted(picture: Picture, width: int, height: int, fit: Fit = "stretch", background: str = WHITE) -> np.ndarray:
    """A picture, RGB or grey, as uint8 [C, height, width], resized with an antialiasing bicubic filter.

    `stretch` changes its proportions; `crop` keeps the largest part in its middle that has the new proportions; `pad`
    keeps all of it, with margins of `background`.
    """
    from PIL import Image, ImageOps

    size, method = (width, height), Image.Resampling.BICUBIC
    if fit == "crop":
        picture = ImageOps.fit(picture, size, method)
    elif fit == "pad":
        picture = ImageOps.pad(picture, size, method, background)
    elif picture.size != size:
        picture = picture.resize(size, method)
    return np.asarray(picture).reshape(height, width, -1).transpose(2, 0, 1)


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """An image, uint8 [H, W, C] of 3 channels or one, in another size."""
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).reshape(height, width, -1)


def _in_8_bits(image: Picture) -> Picture:
    """Grey of 16 bits scaled to 8: Pillow's own conversion cuts at 255."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of unknown range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _opaque(image: Picture, background: str) -> Picture:
    """A picture with transparent pixels, composited on the background."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(canvas, image.convert("RGBA"))
