"""What fetching, adopting and unpacking share: errors, durable writes, and what archives hold that is no data."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from src.common.errors import NO_ROOM, Failure
from src.common.files import sha256_of

if TYPE_CHECKING:
    pass

BY_HAND = "fetch the file by hand and give data.archive=PATH"


class SourceError(Failure):
    """One line: what was wrong, where, what to do."""


def expect_sha256(path: Path, expected: str | None, what: str) -> str:
    digest = sha256_of(path)
    if expected and digest != expected:
        raise SourceError(
            f"{what} has sha256 {digest}, expected {expected}: name the right file, or give its own sha256 (or null)"
        )
    return digest


@contextmanager
def replacing_durably(destination: Path) -> Iterator[Path]:
    """Yields a temporary path beside `destination` that becomes it if the block succeeds, and goes if it does not."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, destination)
        sync(destination.parent)
    finally:
        temporary.unlink(missing_ok=True)


def move_verified(source: Path, destination: Path, digest: str) -> None:
    """Moves a verified file; across file systems by a copy, which is verified again."""
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        sync(source)
        try:
            os.replace(source, destination)
            sync(destination.parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with replacing_durably(destination) as temporary:
                shutil.copyfile(source, temporary)
                expect_sha256(temporary, digest, f"the copy of {source}")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Says in one line what the operating system refused while `place` was read or written."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in NO_ROOM:
            raise SourceError(
                f"no room to write {place} ({why}): free some space and run again, or {BY_HAND} on a larger disk"
            ) from error
        raise SourceError(f"{error.filename or place}: {why}: make it accessible and run again") from error


def is_html(path: Path) -> bool:
    """Whether a file is a web page: what sign-in, consent and error pages put in an archive's place."""
    with path.open("rb") as file:
        return file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html"))


def is_junk(name: PurePosixPath) -> bool:
    """What macOS adds to folders and archives."""
    return "__MACOSX" in name.parts or name.name == ".DS_Store" or name.name.startswith("._")
