"""Labelled images: `images` uint8 [N, C, H, W] of one size, `labels` int64 [N]."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.common.hardware import release_freed_memory
from src.configuration.schema import Fraction, Loader, NonNegativeInt, PositiveInt, Section
from src.data.batching import RowBatches, generator
from src.data.image_files import SUFFIXES, WHITE, fitted, open_image
from src.data.kinds import Feed, Inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from src.data.batching import Batch


# Python that writes `output`, float [B, C, H, W] in 0..1, as a model card shows it.
WRITE_PICTURE = """\
Image.fromarray((255 * output[0]).round().astype(np.uint8).transpose(1, 2, 0).squeeze()).save("output.png")
"""


class LowResolution(Section):
    """Progressive resizing (Howard, 2018): small training images at first, which take less time."""

    size: PositiveInt = Field(description="pixels a side")
    until: Fraction = Field(description="of the run's epochs")


class ImageLoader(Loader):
    """Batches of images and their augmentation."""

    flip: Literal["none", "random", "alternating"] = Field(
        default="none", description="alternating: random in the first epoch, then every second epoch mirrored"
    )
    crop_padding: NonNegativeInt = Field(
        default=0, description="pixels of reflected border, from which a random crop is taken"
    )
    rotation: float = Field(default=0.0, ge=0, le=180, description="degrees; the largest random turn, either way")
    cutout: NonNegativeInt = Field(
        default=0, description="pixels a side of a square that gets the training images' mean colour; 0: none"
    )
    low_resolution: LowResolution | None = Field(
        default=None, description="smaller training images in the first part of the epochs; null: always full size"
    )


class ImageBatches(RowBatches):
    """(images uint8 [B, C, H, W], labels int64 [B]).

    Raises:
        Failure: there is more crop padding than the images have pixels.
    """

    loader: ImageLoader
    rows = ("images", "labels")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        height, width = self.split["images"].shape[2:]
        if self.loader.crop_padding >= min(height, width):  # there would be too few pixels to reflect
            raise Failure(
                f"data.loader.crop_padding: {self.loader.crop_padding}, but the images are {height}x{width}; "
                f"give at most {min(height, width) - 1}"
            )

    @property
    def _low_resolution(self) -> int:
        """The size that this epoch's images are brought to; 0: they keep their own."""
        low = self.loader.low_resolution
        return low.size if self.train and low and self.epoch < round(low.until * self.epochs) else 0

    def set_epoch(self, epoch: int) -> None:
        before = self._low_resolution
        super().set_epoch(epoch)
        if self._low_resolution != before:
            release_freed_memory()

    def assemble(self, source: Mapping[str, Tensor], at: Tensor, indices: Tensor, index: int) -> Batch:
        import torch

        from src.data import augmentation

        images, labels = source["images"], source["labels"]
        on_device = at.to(images.device, non_blocking=True)
        if not self.train:
            return images[on_device], labels[on_device]
        mirrored = None
        if self.loader.flip == "alternating":
            # Keller Jordan's airbench: mirrored at random in epoch 0, then each image the other way round every epoch.
            mirrored = self._mirrored_first[indices] ^ bool(self.epoch % 2)
        elif self.loader.flip == "random":
            mirrored = torch.rand(len(indices), generator=generator(self.seed, "flip", self.epoch, index)) < 0.5
        if mirrored is not None:
            mirrored = mirrored.to(images.device, non_blocking=True)
        random = generator(self.seed, "crop", self.epoch, index)
        batch = augmentation.crop_and_flip(images, on_device, self.loader.crop_padding, mirrored, random)
        if self.loader.rotation:
            batch = augmentation.rotate(
                batch, self.loader.rotation, generator(self.seed, "rotation", self.epoch, index)
            )
        if self.loader.cutout:
            random = generator(self.seed, "cutout", self.epoch, index)
            batch = augmentation.cut_out(batch, self.loader.cutout, self._mean_colour(batch.device), random)
        if size := self._low_resolution:
            batch = augmentation.shrink(batch, size)
        return batch, labels[on_device]

    def _mean_colour(self, device: torch.device) -> Tensor:
        """The channels' mean over the training images: uint8 [C]."""
        import torch

        return torch.tensor(self.meta["mean"]).mul(255).round().to(device, torch.uint8)

    @cached_property
    def _mirrored_first(self) -> Tensor:
        """Which images of the split are mirrored in epoch 0: bool [N], on the CPU."""
        import torch

        return torch.rand(len(self.split["images"]), generator=generator(self.seed, "flip")) < 0.5


class Images:
    """The kind of labelled images."""

    options = ImageLoader
    batches = ImageBatches
    inputs = Inputs(("image",), ({0: "batch"},))
    suffixes = SUFFIXES
    example_argument = "input.png"
    hub_prefix = "image"

    def count(self, arrays: Mapping[str, Any]) -> int:
        return len(arrays["labels"])

    def read(self, source: str | None, signature: Mapping[str, Any]) -> Feed:
        """An image file as `image` uint8 [1, C, H, W], resized to the model's size."""
        return {"image": read_image(source, signature)}

    def shown(self, split: Mapping[str, Tensor], meta: Mapping[str, Any], indices: list[int]) -> np.ndarray:
        return split["images"][indices].permute(0, 2, 3, 1).cpu().numpy()

    def signature(self, meta: Mapping[str, Any], loader: Loader) -> dict[str, Any]:
        return {key: meta[key] for key in ("classes", "shape", "fit", "background") if key in meta}

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return image_snippet(signature)


def read_image(source: str | None, signature: Mapping[str, Any]) -> np.ndarray:
    """An image file as uint8 [1, C, H, W] of the signature's `shape`, decoded and fitted as the training images were.

    Raises:
        Failure: there is no such file, or it can't be read.
    """
    if source is None:
        raise Failure(f"no input: {signature['name']} wants an image")
    if not _is_file(source):
        raise Failure(f"{source}: no such file")
    channels, height, width = signature["shape"]
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise Failure(f"{source} can't be read ({error.strerror}): make it accessible") from None
    background = signature.get("background", WHITE)
    picture = open_image(content, source, channels=channels, background=background).picture
    return fitted(picture, width, height, signature.get("fit", "stretch"), background)[None]


def _is_file(source: str) -> bool:
    return len(source) < 250 and Path(source).is_file()  # the system refuses to look for longer names


def image_snippet(signature: Mapping[str, Any]) -> str:
    """Python that reads input.png into `image`, uint8 [1, C, H, W]."""
    channels, height, width = signature["shape"]
    size = f"({width}, {height}), Image.Resampling.BICUBIC"
    resize = {
        "stretch": f"photo.resize({size})",
        "crop": f"ImageOps.fit(photo, {size})",
        "pad": f"ImageOps.pad(photo, {size}, {signature.get('background', WHITE)!r})",
    }[signature.get("fit", "stretch")]
    return f"""\
from PIL import Image, ImageOps
photo = ImageOps.exif_transpose(Image.open("input.png")).convert("{"RGB" if channels == 3 else "L"}")
photo = {resize}
image = np.asarray(photo).reshape({height}, {width}, {channels}).transpose(2, 0, 1)[None]  # uint8 [1, {channels}, ...]
"""


def image_to_image_snippet(signature: Mapping[str, Any]) -> str:
    """Python that draws output.png from input.png."""
    channels, height, width = signature["shape"]
    return f"""\
{image_snippet(signature)}\
output = session.run(None, {{"image": image}})[0]  # float32 [1, {channels}, {height}, {width}] in 0..1
{WRITE_PICTURE}"""


KIND = Images()
