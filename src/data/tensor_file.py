"""Writes a safetensors file piece by piece, with the bytes that `safetensors.numpy.save` would write at once."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

_HASHED = 1 << 20  # bytes read back at a time


class TensorFile:
    """An open safetensors file whose arrays are written in any order, and from several threads.

    `offsets` says where in the file the content of each array begins.

    Args:
        path: the file, which is made or replaced.
        arrays: shape and dtype of each array.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, path: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self.path = path
        header, starts, size = _layout(arrays)
        self.offsets = {key: len(header) + start for key, start in starts.items()}
        self.size = len(header) + size
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._sha256 = hashlib.sha256()
        self._hashed = 0  # bytes from the file's beginning that the sha256 has
        os.ftruncate(self._descriptor, self.size)
        self.write(0, header)

    def write(self, offset: int, content: bytes | memoryview) -> None:
        """Writes bytes to their place, and hashes them if all before them are."""
        write_at(self._descriptor, offset, content)
        self.hash_written(offset, offset + len(content))

    def hash_written(self, start: int, stop: int) -> None:
        """Adds bytes that stand in the file to its sha256, unless something before them is missing.

        While they are still in the page cache: a large file is not read from the disk again.
        """
        if start != self._hashed:
            return
        while self._hashed < stop:
            content = os.pread(self._descriptor, min(_HASHED, stop - self._hashed), self._hashed)
            if not content:
                raise OSError(f"{self.path} is shorter than what was written to it")
            self._sha256.update(content)
            self._hashed += len(content)

    def sha256(self) -> str:
        """The sha256 of the complete file; reads what `hash_written` could not follow.

        The file is opened again, since NFS shows what other machines wrote only to those who open it afterwards.
        """
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_RDONLY)
        self.hash_written(self._hashed, self.size)
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)


def write_at(descriptor: int, offset: int, content: bytes | memoryview) -> None:
    """Writes all of `content`, as often as it takes: one call writes 2 GiB at most."""
    remaining = memoryview(content)
    while remaining:
        count = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[count:], offset + count


def _layout(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> tuple[bytes, dict[str, int], int]:
    """The header, where each array begins behind it, and the bytes of all arrays.

    Order of arrays, names of types and padding are the library's own: those of a file of empty arrays.
    """
    from safetensors.numpy import save

    empty = save({key: np.empty((0, *shape[1:]), dtype) for key, (shape, dtype) in sorted(arrays.items())})
    facts = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    starts, end = {}, 0
    for key in facts:
        shape, dtype = arrays[key]
        starts[key], end = end, end + math.prod(shape) * dtype.itemsize
        facts[key] |= {"shape": list(shape), "data_offsets": [starts[key], end]}
    header = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, starts, end
