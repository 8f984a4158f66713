"""Decodes and resizes image files: one way for packing, predict and every other place that reads one. No torch.

A picture is decoded as people see it: turned as its EXIF data say, 16-bit grey scaled to 8 bits, transparency shown on
a background, the first frame of an animation.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np

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


def decode(content: bytes, name: str, *, channels: int = 3, background: str = WHITE) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, C], RGB or grey.

    Raises:
        SourceError: naming the image that can't be decoded, or has more pixels than Pillow allows (179 million).
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image: Picture = Image.open(io.BytesIO(content), formats=FORMATS)
        if turn := _UPRIGHT.get(image.getexif().get(ORIENTATION, 1)):
            image = image.transpose(Image.Transpose[turn])
        image = _opaque(_in_8_bits(image), background)
        pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except UnidentifiedImageError:
        raise SourceError(f"{name} can't be read as an image: it is none of {', '.join(FORMATS)}") from None
    except (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise SourceError(f"{name} can't be read as an image ({error}): remove or replace it") from None
    return pixels.reshape(*pixels.shape[:2], channels)


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
