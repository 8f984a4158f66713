"""Helpers of the fetching modules: errors, verified moves, and the contents that are not data."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from src.common.errors import NO_ROOM, Failure
from src.common.files import replacing_path, sha256_of, sync

BY_HAND = "fetch the file by hand and give data.archive=PATH"


class SourceError(Failure):
    """One line: what was wrong, where, what to do."""


def expect_sha256(path: Path, expected: str | None, what: str) -> str:
    """The sha256 of a file; `what` names the file in the message.

    Raises:
        SourceError: it is not the expected one.
    """
    digest = sha256_of(path)
    if expected and digest != expected:
        raise SourceError(
            f"{what} has sha256 {digest}, expected {expected}: name the right file, or give its own sha256 (or null)"
        )
    return digest


def move_verified(source: Path, destination: Path, digest: str) -> None:
    """Moves a verified file atomically; across file systems by a copy, which is verified again.

    Raises:
        SourceError: the disk is full, or the copy differs.
    """
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        sync(source)
        try:
            os.replace(source, destination)
            sync(destination.parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with replacing_path(destination) as temporary:
                shutil.copyfile(source, temporary)
                expect_sha256(temporary, digest, f"the copy of {source}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError raised while `path` is read or written into a SourceError of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NO_ROOM:
            raise SourceError(
                f"no room to write {path} ({reason}): free some space and run again, or {BY_HAND} on a larger disk"
            ) from error
        raise SourceError(f"{error.filename or path}: {reason}: make it accessible and run again") from error


def is_html(path: Path) -> bool:
    """Whether a file is a web page: sign-in, consent and error pages arrive in place of an archive."""
    with path.open("rb") as file:
        return file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html"))


def is_junk(name: PurePosixPath) -> bool:
    """Whether macOS added this file to a folder or an archive."""
    return "__MACOSX" in name.parts or name.name == ".DS_Store" or name.name.startswith("._")
