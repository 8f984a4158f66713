"""CIFAR-10, binary version: records of a label byte and 3,072 pixel bytes (red, green and blue planes of 32x32)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from src.configuration.schema import SplitSeed, ValFraction
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.packed import Packed, pack_images

RECORD = 1 + 3 * 32 * 32  # bytes


class Cifar10:
    """Reads an archive with `batches.meta.txt`, `data_batch_*.bin` and `test_batch.bin` in any folder."""

    kind = "images"
    archive_name = "cifar-10-binary.tar.gz"
    sample: ClassVar[str] = "src.data.samples.images"

    def __init__(self, *, val_fraction: ValFraction = 0.1, split_seed: SplitSeed = 0) -> None:
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and checks the archive.

        Raises:
            SourceError: a file is missing, truncated or holds an impossible label.
        """
        files = {name.rpartition("/")[2]: content for name, content in read_archive(archive)}
        if "batches.meta.txt" not in files:
            raise SourceError(
                f"{archive}: no batches.meta.txt in it: give CIFAR-10's *binary* version, not the Python one"
            )
        classes = files["batches.meta.txt"].decode("utf-8-sig", "replace").split()
        train = [
            _records(archive, name, files[name], len(classes))
            for name in sorted(files)
            if name.startswith("data_batch")
        ]
        if not train or "test_batch.bin" not in files:
            raise SourceError(
                f"{archive}: data_batch_*.bin or test_batch.bin is missing; it holds {', '.join(sorted(files))}"
            )
        return pack_images(
            (np.concatenate([images for images, _ in train]), np.concatenate([labels for _, labels in train])),
            None,
            _records(archive, "test_batch.bin", files["test_batch.bin"], len(classes)),
            classes=classes,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
        )


def _records(archive: Path, name: str, content: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and labels uint8 [N]."""
    if len(content) % RECORD or not content:
        raise SourceError(
            f"{archive}: {name} has {len(content)} bytes, not a multiple of the {RECORD} bytes of a record; "
            "fetch it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    if (largest := int(records[:, 0].max())) >= classes:
        raise SourceError(f"{archive}: {name} holds the label {largest}, but there are {classes} classes")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
