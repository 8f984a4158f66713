"""Helpers of the embedded samples: writing their archive, and tinting colours."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from src.common.files import replacing

Colour = tuple[int, int, int]
Floats = npt.NDArray[np.float32]


def write_archive(archive: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes a tar.gz whose bytes depend only on the members: no dates, no owner, no file name."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(archive) as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in members:
            entry = tarfile.TarInfo(name)  # mtime, uid and gid are 0
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def tint(colour: Colour, factor: float) -> Colour:
    """Darkens (factor below 1) or lightens (above 1) a colour."""
    red, green, blue = (min(255, max(0, int(value * factor))) for value in colour)
    return red, green, blue
