"""Safe reading of raw archives.

`read_archive` yields the files of a tar or zip from memory and refuses hostile or damaged members; nothing is unpacked
to disk.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from src.data.fetching.files import SourceError, disk_errors, is_html, is_junk

_CHUNK = 1 << 16  # bytes of a tar's padding read at a time
_MAX_RATIO, _HARMLESS = 100, 256 << 20  # size of the content to that of the archive; bytes allowed whatever the ratio
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
    max_bytes: int = 8 << 30,
    max_member_bytes: int = 1 << 30,
) -> Iterator[tuple[str, bytes]]:
    """Yields (posix name, content) of the regular files of a tar (plain, gz, bz2, xz) or zip, in the archive's order.

    The format is recognised by content, not by suffix. The files that macOS adds are skipped. A member is
    checked when its turn comes: a caller that must not act on a part of an archive exhausts the iterator first.

    Args:
        with_folders: yield the listed folders too, as ("NAME/", b"").
        nested: zip files in a plain tar count as folders, as in the tar of an official set of several archives; they
            are read in place, whatever their size.
        max_bytes: bytes that all members together may declare; each counts at least 512, so names are bounded too.
            More than a hundred times the archive's size is refused too, since the content is held in memory.
        max_member_bytes: bytes that one member may declare, since its content is held in memory.

    Raises:
        SourceError: a name is absolute, leads out of the archive, or occurs twice; a member is a link, a device,
            encrypted or too large; the archive is truncated, damaged, of an unknown format, or has no file.
    """
    if not path.is_file():
        raise SourceError(f"no archive at {path}: fetch it, or give data.archive=PATH")
    max_bytes = min(max_bytes, max(_HARMLESS, _MAX_RATIO * path.stat().st_size))
    gate = _Gate(path, max_bytes, max_member_bytes, with_folders)
    with disk_errors(path), path.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        try:
            if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                yield from _zip_files(file, gate)
            else:
                yield from _tar_files(_decompressed(file, head), gate, nested)
        except _DAMAGE as error:
            fault = "a web page, not an archive" if is_html(path) else f"truncated, damaged or no archive ({error})"
            raise SourceError(f"{path} is {fault}: {_REMEDY}") from error
    if not gate.names:
        raise SourceError(f"{path} holds no file: {_REMEDY}")


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


def _decompressed(file: io.BufferedReader, head: bytes) -> io.BufferedIOBase:
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


def _tar_files(file: io.BufferedIOBase, gate: _Gate, nested: bool) -> Iterator[tuple[str, bytes]]:
    headers = _TarHeaders(file)
    tar = tarfile.TarFile(fileobj=headers)  # type: ignore[arg-type]
    while member := tar.next():
        tar.members = []  # type: ignore[attr-defined]  # or it keeps every record: 100 MB for 100,000 files
        if nested and member.isreg() and member.name.lower().endswith(".zip") and isinstance(file, io.BufferedReader):
            gate.admit(member.name, 0, "file")
            yield from _zip_files(_Part(file, member.offset_data, member.size), gate, f"{member.name}/")
            headers.left = _MAX_TAR_HEADER
            continue
        name = gate.admit(member.name, member.size, _tar_kind(member))
        if name is not None and name.endswith("/"):
            yield name, b""
        elif name is not None:
            file.seek(member.offset_data)
            content = file.read(member.size)
            if len(content) != member.size:
                raise tarfile.ReadError(f"{member.name!r} ends early")
            yield name, content
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
        self.file.seek(self.start + self.position)
        content = self.file.read(min(len(buffer), max(0, self.size - self.position)))
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def _zip_files(file: Any, gate: _Gate, above: str = "") -> Iterator[tuple[str, bytes]]:
    """The files of a zip; `above` stands before their names."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if PurePosixPath(member.filename).is_absolute():
                gate.admit(member.filename, 0, "file")  # refuses it, which `above` would hide
            name = gate.admit(f"{above}{member.filename}", member.file_size, _zip_kind(member))
            if name is not None:
                with archive.open(member) as content:
                    # One byte more than declared: it bounds the memory and makes zipfile verify the checksum.
                    data = content.read(member.file_size + 1)
                if len(data) != member.file_size:
                    raise zipfile.BadZipFile(f"{name!r} has {len(data):,} bytes, not the {member.file_size:,} declared")
                yield name, data


def _zip_kind(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "neither stored nor deflated"  # zipfile decompresses the other methods without a bound on memory
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 from tools that know no Unix modes
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a symbolic link" if kind == stat.S_IFLNK else "a device, fifo or other special file"
    return "folder" if member.is_dir() else "file"
