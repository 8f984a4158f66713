"""Packed splits read piece by piece, memory-mapped, without torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from src.data.packed import PackedError
from src.data.verifying import noted_sha256

PIECE = 8 * 2**20  # bytes that are read at once
DTYPES = {
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F32": np.float32,
    "F64": np.float64,
    "BOOL": np.bool_,
}


class StoredArray:
    """An array of a split, which stays on the disk: slices and single rows of it are read when they are wanted."""

    def __init__(self, path: Path, facts: Mapping[str, Any], start: int) -> None:
        """`facts`: the array's entry in the file's header; `start`: where the arrays begin in the file."""
        self.shape: tuple[int, ...] = tuple(facts["shape"])
        self.dtype = np.dtype(DTYPES[facts["dtype"]])
        self._path, self._offset = path, start + facts["data_offsets"][0]

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _map(self) -> np.ndarray:
        if 0 in self.shape:  # no byte to map
            return np.empty(self.shape, self.dtype)
        return np.memmap(self._path, self.dtype, "r", self._offset, self.shape)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows by a slice or indices, as a copy in memory."""
        return np.array(self._map[rows])

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows in their order, about `PIECE` bytes at a time; what was read leaves the process's memory."""
        step = max(1, PIECE // max(1, self.dtype.itemsize * int(np.prod(self.shape[1:]))))
        for start in range(0, len(self), step):
            yield self[start : start + step]
            if isinstance(self._map, np.memmap):
                self._map._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # numpy keeps it there


class StoredSplit(Mapping[str, StoredArray]):
    """The arrays of one packed split by name.

    Raises:
        PackedError: the file is missing, or not the one that was packed.
    """

    def __init__(self, folder: Path, split: str, meta: Mapping[str, Any]) -> None:
        path = folder / f"{split}.safetensors"
        if not path.is_file():
            raise PackedError(f"{path} is missing: run `dvc repro` (or `dvc pull`) to prepare the data")
        if noted_sha256(path) != meta["splits"][split]["sha256"]:
            raise PackedError(f"{path} is damaged: delete {folder} and run `dvc repro`, or the command again")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        self._arrays = {
            name: StoredArray(path, facts, 8 + size) for name, facts in header.items() if name != "__metadata__"
        }

    def __getitem__(self, name: str) -> StoredArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
