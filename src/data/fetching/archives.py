"""Safe reading of raw archives: hostile or damaged members are refused, and no member is unpacked to disk.

`read_archive` yields the files of a tar or zip one after another; `Archive` reads them in any order, from any thread.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from src.data.fetching.files import SourceError, disk_errors, is_html, is_junk

_CHUNK = 1 << 16  # bytes of a tar's padding read at a time
_MAX_RATIO, _HARMLESS = 100, 256 << 20  # size of the content to that of the archive; bytes allowed whatever the ratio
_MAX_MEMBER = 1 << 30  # bytes
_COPIED = 1 << 20  # bytes of a compressed tar that are copied at a time
_MAX_TAR_HEADER = 1 << 20  # bytes; tarfile reads a long name or pax record into memory in one go
_REMEDY = "delete it and fetch it again, or give data.archive=PATH of a sound copy"
# Raised by the parsers on damaged bytes. RuntimeError: zipfile, and the recursion of nested tar headers.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
)


def read_archive(
    path: Path,
    *,
    with_folders: bool = False,
    nested: bool = False,
    max_bytes: int | None = None,
    max_member_bytes: int | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yields (posix name, content) of the regular files of a tar (plain, gz, bz2, xz) or zip, in the archive's order.

    The format is recognised by content, not by suffix. The files that macOS adds are skipped. A member is
    checked when its turn comes: a caller that must not act on a part of an archive exhausts the iterator first.

    Args:
        with_folders: yield the listed folders too, as ("NAME/", b"").
        nested: zip files in a plain tar count as folders, as in the tar of an official set of several archives; they
            are read in place, whatever their size.
        max_bytes: bytes that all members together may declare; each counts at least 512, so names are bounded too.
            None: a hundred times the archive's size. What is not compressed can't be a bomb, whatever its size.
        max_member_bytes: bytes that one member may declare, since its content is held in memory. None: 1 GiB, or the
            archive's size if that is more.

    Raises:
        SourceError: a name is absolute, leads out of the archive, or occurs twice; a member is a link, a device,
            encrypted or too large; the archive is truncated, damaged, of an unknown format, or has no file.
    """
    gate = _gate(path, with_folders, max_bytes, max_member_bytes)
    with _damage_named(path), path.open("rb") as file:
        for name, place in _places(_decompressed(file), gate, nested):
            yield name, b"" if place is None else place.read()
    if not gate.names:
        raise SourceError(f"{path} holds no file: {_REMEDY}")


class Archive:
    """The files of an archive, read in any order and by several threads at once; the checks are `read_archive`'s.

    A compressed tar is decompressed into a temporary file beside it, which has no name and is gone with this object. In
    memory are the names and places of the files: about 0.2 kB each, 1 kB in a zip.

    Args:
        path: a tar (plain, gz, bz2, xz) or zip.
        nested: as in `read_archive`.

    Raises:
        SourceError: as `read_archive`, but for a fault in a member's content, which `read` raises.
    """

    def __init__(self, path: Path, *, nested: bool = False) -> None:
        self.path = path
        self.nested = nested
        gate = _gate(path, True, None, None)
        # By name, in the archive's order: a number for a file in a tar; None for a folder, whose name ends in "/".
        self.places: dict[str, int | _InZip | None] = {}
        self._offsets, self._sizes = array("q"), array("q")  # of the content of files in a tar, by number
        with _damage_named(path):
            self._file = self._with_random_access(gate.max_bytes)
            self._bytes = os.fstat(self._file.fileno()).st_size
            for name, place in _places(self._file, gate, nested):
                if not isinstance(place, _InTar):
                    self.places[name] = place
                    continue
                if place.offset + place.size > self._bytes:
                    raise tarfile.ReadError(f"{name!r} ends early")
                self.places[name] = len(self._offsets)
                self._offsets.append(place.offset)
                self._sizes.append(place.size)
        if not gate.names:
            raise SourceError(f"{path} holds no file: {_REMEDY}")

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            SourceError: it is damaged.
        """
        place = self.places[name]
        assert place is not None
        with _damage_named(self.path):
            if isinstance(place, int):
                return os.pread(self._file.fileno(), self._sizes[place], self._offsets[place])
            return place.read()

    def _with_random_access(self, max_bytes: int) -> io.BufferedReader:
        file = self.path.open("rb")
        content = _decompressed(file)
        if content is file:
            return file
        with disk_errors(self.path.parent):
            copy = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 (open as long as this object)
        copied = 0
        while chunk := content.read(_COPIED):
            copied += len(chunk)
            if copied > max_bytes + _HARMLESS:
                raise tarfile.ReadError(f"its content has more than the {max_bytes:,} bytes allowed")
            with disk_errors(self.path.parent):
                copy.write(chunk)
        with disk_errors(self.path.parent):
            copy.flush()
        copy.seek(0)
        return io.BufferedReader(io.FileIO(os.dup(copy.fileno())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.path, self.nested)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, nested: bool) -> Archive:
    """An archive that another process has opened; several tasks of one process share it."""
    return Archive(path, nested=nested)


def _gate(path: Path, with_folders: bool, max_bytes: int | None, max_member_bytes: int | None) -> _Gate:
    if not path.is_file():
        raise SourceError(f"no archive at {path}: fetch it, or give data.archive=PATH")
    size = path.stat().st_size
    by_ratio = max(_HARMLESS, _MAX_RATIO * size)
    return _Gate(
        path,
        by_ratio if max_bytes is None else min(max_bytes, by_ratio),
        max(_MAX_MEMBER, size) if max_member_bytes is None else max_member_bytes,
        with_folders,
    )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what the parsers raise on damaged bytes into a SourceError of one line."""
    with disk_errors(path):
        try:
            yield
        except _DAMAGE as error:
            fault = "a web page, not an archive" if is_html(path) else f"truncated, damaged or no archive ({error})"
            raise SourceError(f"{path} is {fault}: {_REMEDY}") from error


def _places(file: io.BufferedIOBase, gate: _Gate, nested: bool) -> Iterator[tuple[str, _Place | None]]:
    """The name of each file and the place of its content; of folders too, without a place, if the gate admits them."""
    if isinstance(file, io.BufferedReader) and file.peek(4).startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_places(file, gate)
    return _tar_places(file, gate, nested)


class _InTar(NamedTuple):
    """The place of a file's content in a tar."""

    name: str
    file: io.BufferedIOBase
    offset: int
    size: int

    def read(self) -> bytes:
        """The content, where the tar is read from its beginning to its end."""
        self.file.seek(self.offset)
        content = self.file.read(self.size)
        if len(content) != self.size:
            raise tarfile.ReadError(f"{self.name!r} ends early")
        return content


class _InZip(NamedTuple):
    """The place of a file's content in a zip."""

    archive: zipfile.ZipFile
    member: zipfile.ZipInfo

    def read(self) -> bytes:
        """The content; zipfile has a lock for threads."""
        with self.archive.open(self.member) as content:
            # One byte more than declared: it bounds the memory and makes zipfile verify the checksum.
            data = content.read(self.member.file_size + 1)
        if len(data) != self.member.file_size:
            name, declared = self.member.filename, self.member.file_size
            raise zipfile.BadZipFile(f"{name!r} has {len(data):,} bytes, not the {declared:,} declared")
        return data


_Place = _InTar | _InZip


@dataclass
class _Gate:
    """Checks an archive's members: refuses hostile ones, skips those without data."""

    path: Path
    max_bytes: int
    max_member_bytes: int
    with_folders: bool
    names: set[str] = field(default_factory=set)
    declared: int = 0

    def admit(self, name: str, size: int, kind: str) -> str | None:
        """The normalised name of a member, a folder's with "/" at its end, or None to skip it.

        Any `kind` but file and folder is refused.
        """
        clean = PurePosixPath(name)
        if clean.is_absolute() or ".." in clean.parts or re.search(r"^[A-Za-z]:|[\\\0]", name):
            raise self._refusal(name, "has a name that leads out of the archive")
        if kind not in ("file", "folder"):
            raise self._refusal(name, f"is {kind}")
        self.declared += max(size, tarfile.BLOCKSIZE)
        if not 0 <= size <= self.max_member_bytes:
            raise self._refusal(name, f"declares {size:,} bytes, more than the {self.max_member_bytes:,} allowed")
        if self.declared > self.max_bytes:
            raise self._refusal(name, f"brings the content to more than the {self.max_bytes:,} bytes allowed")
        if is_junk(clean):
            return None
        if kind == "folder":
            return f"{clean}/" if self.with_folders else None
        if str(clean) in self.names:
            raise self._refusal(name, "occurs twice")
        self.names.add(str(clean))
        return str(clean)

    def _refusal(self, name: str, reason: str) -> SourceError:
        return SourceError(
            f"{self.path}: member {name!r} {reason}: do not trust this archive, get it from another source"
        )


def _decompressed(file: io.BufferedReader) -> io.BufferedIOBase:
    """The content of a compressed file; another file as it is."""
    head = file.peek(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(file)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(file)
    return file


class _TarHeaders:
    """The file that TarFile reads headers from: bounds their size, for the sake of memory, and keeps the last."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell
        self.left = _MAX_TAR_HEADER
        self.last = b""

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {_MAX_TAR_HEADER:,} bytes")
        self.last = self.file.read(size)
        return self.last


def _tar_places(file: io.BufferedIOBase, gate: _Gate, nested: bool) -> Iterator[tuple[str, _Place | None]]:
    headers = _TarHeaders(file)
    tar = tarfile.TarFile(fileobj=headers)  # type: ignore[arg-type]
    while member := tar.next():
        tar.members = []  # type: ignore[attr-defined]  # or it keeps every record: 100 MB for 100,000 files
        if nested and member.isreg() and member.name.lower().endswith(".zip") and isinstance(file, io.BufferedReader):
            gate.admit(member.name, 0, "file")
            yield from _zip_places(_Part(file, member.offset_data, member.size), gate, f"{member.name}/")
            headers.left = _MAX_TAR_HEADER
            continue
        name = gate.admit(member.name, member.size, _tar_kind(member))
        if name is not None:
            yield name, None if name.endswith("/") else _InTar(name, file, member.offset_data, member.size)
        headers.left = _MAX_TAR_HEADER
    # TarFile takes a damaged or missing header for the end of the archive; the true end is zeros, to the last byte.
    # Reading to it also verifies the checksum at the end of a compressed file.
    padding = headers.last
    if len(padding) != tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")
    while padding:
        if padding.strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")
        gate.declared += len(padding)
        if gate.declared > gate.max_bytes:
            raise tarfile.ReadError("endless padding")
        padding = file.read(_CHUNK)


def _tar_kind(member: tarfile.TarInfo) -> str:
    if member.issym():
        return "a symbolic link"
    if member.islnk():
        return "a hard link"
    if member.isdir():
        return "folder"
    if member.issparse():
        return "a sparse file"
    return "file" if member.isreg() else "a device, fifo or other special file"


class _Part(io.RawIOBase):
    """A part of an open file, read as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file = file
        self.start = start
        self.size = size
        self.position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence] + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self.size - self.position))
        content = os.pread(self.file.fileno(), size, self.start + self.position)  # no position to share with a thread
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def _zip_places(file: Any, gate: _Gate, above: str = "") -> Iterator[tuple[str, _Place | None]]:
    """The files of a zip; `above` stands before their names."""
    archive = zipfile.ZipFile(file)
    for member in archive.infolist():
        if PurePosixPath(member.filename).is_absolute():
            gate.admit(member.filename, 0, "file")  # refuses it, which `above` would hide
        name = gate.admit(f"{above}{member.filename}", member.file_size, _zip_kind(member))
        if name is not None:
            yield name, None if name.endswith("/") else _InZip(archive, member)


def _zip_kind(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "neither stored nor deflated"  # zipfile decompresses the other methods without a bound on memory
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 from tools that know no Unix modes
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a symbolic link" if kind == stat.S_IFLNK else "a device, fifo or other special file"
    return "folder" if member.is_dir() else "file"
