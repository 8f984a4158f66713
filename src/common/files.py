"""File digests, and atomic writes: a reader, or a crash, sees the old file or the new one, never half of it.

A file that is replaced is a new inode: where the old one was a link into DVC's cache, or shared with it, the cache
keeps its bytes. So every output is written by this module.
"""

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


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replaces a file's content atomically; `mode` are the permissions of the new file before the umask.

    Raises:
        OSError: it can't be written, for want of room perhaps; the error names the file, and the old one stays.
    """
    with replacing(path, mode) as file:
        file.write(content)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file's content by a text in UTF-8, line ends unchanged.

    Raises:
        OSError: as `write_atomically`.
    """
    write_atomically(path, text.encode())


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yields a file that replaces `path` when the block succeeds, and is removed when it does not.

    Raises:
        OSError: as `write_atomically`.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with replacing_path(path) as temporary, open(temporary, "wb", opener=opener) as file:
        yield file


@contextlib.contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, for a writer that wants a name; the file replaces `path` when the block succeeds.

    The file and its folder are flushed to the disk, so the replacement survives a power failure.

    Raises:
        OSError: as `write_atomically`.
    """
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout, which a user may name, has nothing to replace
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write does not name its file; another file may be at fault
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
