"""Files that others rely on: digests, and writes that are whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, as 64 lower-case hex digits; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that a reader, or a crash, sees the old bytes or the new, never half of them.

    Raises:
        OSError: it can't be written, for want of room perhaps; it names the file, and what was there stays.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path`, whole, when the block ends well.

    Raises:
        OSError: as `write_atomically`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write does not tell; a file within may have its own fault
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
