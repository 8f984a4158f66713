"""Images with boxes: `images` uint8 [N, 3, H, W] of one size, and the boxes of all images one after another.

A split's arrays: `images`; `sizes` int32 [N, 2], height and width of the original picture; `offsets` int64 [N + 1], the
boxes of image i are those from offsets[i] to offsets[i + 1]; `boxes` float32 [M, 4], xyxy in pixels of the packed
image; `labels` int64 [M]; `areas` float32 [M], in pixels of the original picture, as the annotation gives them;
`crowd` and `difficult` uint8 [M].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.configuration.schema import Fraction, Loader
from src.data.batching import RowBatches, generator
from src.data.image_files import SUFFIXES, WHITE, decode, resized
from src.data.kinds import Feed, Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batch

NO_BOX = -1  # the label of a row that only fills up a batch
MARGIN = 127  # the grey of a letterbox's margins
Fit = Literal["stretch", "letterbox"]


@dataclass(frozen=True)
class Placement:
    """Where a picture of `width` x `height` lies in a packed image: x' = x * scale_x + left, y' = y * scale_y + top."""

    width: int
    height: int
    scale_x: float
    scale_y: float
    left: int
    top: int

    @classmethod
    def of(cls, width: int, height: int, shape: tuple[int, int], fit: Fit) -> Placement:
        """The placement in an image of `shape` (height, width).

        `stretch` fills the image, whatever the picture's proportions; `letterbox` keeps them, with grey margins.
        """
        down, across = shape
        if fit == "stretch":
            return cls(width, height, across / width, down / height, 0, 0)
        scale = min(across / width, down / height)
        inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
        return cls(
            width,
            height,
            inner_width / width,
            inner_height / height,
            (across - inner_width) // 2,
            (down - inner_height) // 2,
        )

    def apply(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """A picture uint8 [H, W, 3] as a packed image uint8 [3, *shape]."""
        inner_width, inner_height = round(self.width * self.scale_x), round(self.height * self.scale_y)
        inner = resized(picture, inner_width, inner_height)
        if inner.shape[:2] == shape:
            return inner.transpose(2, 0, 1)
        image = np.full((*shape, 3), MARGIN, np.uint8)
        image[self.top : self.top + inner_height, self.left : self.left + inner_width] = inner
        return image.transpose(2, 0, 1)

    def to_packed(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes float [..., 4] of the original picture, xyxy, in pixels of the packed image."""
        return (boxes * self._scales + self._shifts).astype(np.float32)

    def to_original(self, boxes: np.ndarray) -> np.ndarray:
        """The way back, float32 [..., 4], clipped to the picture."""
        limits = np.array([self.width, self.height, self.width, self.height], np.float32)
        return ((boxes - self._shifts) / self._scales).clip(0, limits).astype(np.float32)

    @property
    def _scales(self) -> np.ndarray:
        return np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y])

    @property
    def _shifts(self) -> np.ndarray:
        return np.array([self.left, self.top, self.left, self.top], np.float64)


def placement_of(meta: Mapping[str, Any], height: int, width: int) -> Placement:
    """The placement of a picture of this size, by a packed data set's meta or a model's signature."""
    return Placement.of(width, height, tuple(meta["shape"][1:]), meta["fit"])


class BoxLoader(Loader):
    """Batches of images with boxes and their augmentation, after the SSD paper (Liu et al., 2016, section 2.2)."""

    flip: Literal["none", "random"] = Field(default="none", description="random: half of the images are mirrored")
    zoom_out: Fraction = Field(
        default=0.0,
        description="probability that an image becomes a part of a larger grey canvas: small objects",
    )
    zoom_largest: float = Field(
        default=4.0, gt=1, le=8, description="side of the largest canvas, in sides of the image"
    )
    iou_crop: Fraction = Field(
        default=0.0, description="probability of a random crop that overlaps an object by a drawn share: large objects"
    )
    crop_smallest: float = Field(
        default=0.3, gt=0, lt=1, description="smallest side of that crop, in sides of the image"
    )
    photometric: Fraction = Field(
        default=0.0, description="probability of each change of brightness, contrast, saturation, hue and channels"
    )


class BoxBatches(RowBatches):
    """(images uint8 [B, 3, H, W], boxes fp32 [B, M, 4], labels int64 [B, M], ignored bool [B, M]).

    M is the largest number of boxes in the split, at least one; rows beyond an image's boxes have the label -1.
    `ignored`: crowds; in evaluation also difficult objects. All batches have one shape.
    """

    loader: BoxLoader
    rows = moved = ("images",)  # the boxes stay on the CPU, where crops are drawn by them

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.most = max(1, int(self.split["offsets"].diff().max()))

    def assemble(self, source: Mapping[str, Tensor], at: Tensor, indices: Tensor, index: int) -> Batch:
        import torch

        split = self.split
        device = source["images"].device
        offsets, counts = split["offsets"][indices], split["offsets"].diff()[indices]
        position = torch.arange(self.most)
        is_box = position < counts[:, None]
        rows = torch.where(is_box, offsets[:, None] + position, 0).flatten()
        flags = split["crowd"] if self.train else split["crowd"] | split["difficult"]
        if len(flags):
            boxes = split["boxes"][rows].view(-1, self.most, 4).masked_fill(~is_box[..., None], 0)
            labels = split["labels"][rows].view(-1, self.most).masked_fill(~is_box, NO_BOX)
            ignored = flags[rows].view(-1, self.most).bool() & is_box
        else:  # a split without any box
            boxes = torch.zeros(len(indices), self.most, 4)
            labels = torch.full((len(indices), self.most), NO_BOX)
            ignored = torch.zeros(len(indices), self.most, dtype=torch.bool)
        images = source["images"][at.to(device, non_blocking=True)]
        if self.train:
            from src.data import box_augmentation

            random = generator(self.seed, "augment", self.epoch, index)
            images, boxes, labels, ignored = box_augmentation.augment(
                images, boxes, labels, ignored, self.loader, margin=MARGIN, random=random
            )
        on_device = (part.to(device, non_blocking=True) for part in (boxes, labels, ignored))
        return images, *on_device


class Boxes:
    """The kind of images with boxes: a network finds objects, each with a box, a class and a score."""

    options = BoxLoader
    batches = BoxBatches
    inputs = Inputs(("image",), ({0: "batch"},))
    suffixes = SUFFIXES
    example_argument = "photo.jpg"
    hub_prefix = "object"

    def count(self, arrays: Mapping[str, Any]) -> int:
        return len(arrays["images"])

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """An image file as `image` uint8 [1, 3, H, W], placed as the packed images are."""
        picture = read_picture(source, signature)
        shape = tuple(signature["shape"][1:])
        return {"image": placement_of(signature, *picture.shape[:2]).apply(picture, shape)[None]}

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> np.ndarray:
        return split["images"][indices].permute(0, 2, 3, 1).cpu().numpy()

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        return {key: meta[key] for key in ("classes", "shape", "fit", "background") if key in meta}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        _, height, width = signature["shape"]
        lines = [
            "from PIL import Image, ImageOps",
            'photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
        ]
        if signature["fit"] == "letterbox":
            lines.append(f"photo = ImageOps.pad(photo, ({width}, {height}), color=({MARGIN},) * 3)")
        else:
            lines.append(f"photo = photo.resize(({width}, {height}), Image.Resampling.BICUBIC)")
        lines.append(f"image = np.asarray(photo).transpose(2, 0, 1)[None]  # uint8 [1, 3, {height}, {width}]")
        return "\n".join(lines) + "\n"


def read_picture(source: str | None, signature: Mapping[str, Any]) -> np.ndarray:
    """An image file in its own size, uint8 [H, W, 3].

    Raises:
        Failure: there is no such file, or it can't be read.
    """
    if source is None:
        raise Failure(f"no input: {signature['name']} wants an image")
    try:
        content = Path(source).read_bytes()
    except FileNotFoundError:
        raise Failure(f"{source}: no such file") from None
    except (OSError, ValueError) as error:  # a name with a null byte
        raise Failure(f"{source[:200]} can't be read ({error}): give the path of an image file") from None
    return decode(content, source, background=signature.get("background", WHITE))


KIND = Boxes()
