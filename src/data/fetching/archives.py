"""How raw archives are read safely.

`read_archive` hands out the files of a tar or zip from memory and refuses what a hostile or damaged archive may hold:
nothing is ever unpacked to disk.
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
from typing import BinaryIO

from src.data.fetching.files import SourceError, disk_errors, is_html, is_junk

_CHUNK = 1 << 16  # bytes of a tar's padding read at a time
_MAX_RATIO, _HARMLESS = 100, 256 << 20  # content to archive; so many bytes may come of however small an archive
_MAX_TAR_HEADER = 1 << 20  # tarfile reads a header's long name or pax record into memory in one go
_ANEW = "delete it and fetch it anew, or give data.archive=PATH of a sound copy"
# What the parsers raise on damaged bytes; RuntimeError is zipfile's, and covers the recursion of nested tar headers.
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
    path: Path, *, max_bytes: int = 8 << 30, max_member_bytes: int = 1 << 30
) -> Iterator[tuple[str, bytes]]:
    """Yields (posix name, content) of the regular files of a tar (plain, gz, bz2, xz) or zip, in the archive's order.

    The kind is told by content, not by suffix. Folders and what macOS adds are skipped. A member is checked when its
    turn comes: whoever must not act on half an archive exhausts the iterator first.

    Args:
        max_bytes: bytes that all members together may declare; each counts at least 512, so names are bounded too.
            More than a hundred times the archive's size is refused as well, for whoever reads it holds it in memory.
        max_member_bytes: bytes that one member may declare, since its content is held in memory.

    Raises:
        SourceError: for a name that is absolute, climbs out, or occurs twice; a link, device, encrypted or oversized
            member; an archive that is truncated, damaged, of no known kind, or without a file.
    """
    if not path.is_file():
        raise SourceError(f"no archive at {path}: fetch it, or give data.archive=PATH")
    max_bytes = min(max_bytes, max(_HARMLESS, _MAX_RATIO * path.stat().st_size))
    gate = _Gate(path, max_bytes, max_member_bytes)
    with disk_errors(path), path.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        try:
            if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                yield from _zip_files(file, gate)
            else:
                yield from _tar_files(_decompressed(file, head), gate)
        except _DAMAGE as error:
            what = "a web page, not an archive" if is_html(path) else f"truncated, damaged or no archive ({error})"
            raise SourceError(f"{path} is {what}: {_ANEW}") from error
    if not gate.names:
        raise SourceError(f"{path} holds no file: {_ANEW}")


@dataclass
class _Gate:
    """What may leave an archive: raises on what is hostile, skips what is no data."""

    path: Path
    max_bytes: int
    max_member_bytes: int
    names: set[str] = field(default_factory=set)
    declared: int = 0

    def admit(self, name: str, size: int, kind: str) -> str | None:
        """The clean name of a member to be read, or None to skip it; `kind` is file, folder, or what is refused."""
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
        if kind == "folder" or is_junk(clean):
            return None
        if str(clean) in self.names:
            raise self._refusal(name, "is there twice")
        self.names.add(str(clean))
        return str(clean)

    def _refusal(self, name: str, why: str) -> SourceError:
        return SourceError(f"{self.path}: member {name!r} {why}: do not trust this archive, get it from another source")


def _decompressed(file: io.BufferedReader, head: bytes) -> io.BufferedIOBase:
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(file)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(file)
    return file


class _TarHeaders:
    """The file that TarFile reads headers from: bounds their size, for it holds them whole, and remembers the last."""

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


def _tar_files(file: io.BufferedIOBase, gate: _Gate) -> Iterator[tuple[str, bytes]]:
    headers = _TarHeaders(file)
    tar = tarfile.TarFile(fileobj=headers)  # type: ignore[arg-type]
    while member := tar.next():
        tar.members = []  # type: ignore[attr-defined]  # or it keeps a record of each: 100 MB for 100,000 files
        name = gate.admit(member.name, member.size, _tar_kind(member))
        if name is not None:
            file.seek(member.offset_data)
            content = file.read(member.size)
            if len(content) != member.size:
                raise tarfile.ReadError(f"{member.name!r} ends early")
            yield name, content
        headers.left = _MAX_TAR_HEADER
    # TarFile takes a damaged or missing header for the end of the archive; the true end is zeros, to the last byte.
    # Reading on to it also checks the sum at the end of a compressed file.
    rest = headers.last
    if len(rest) != tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")
    while rest:
        if rest.strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")
        gate.declared += len(rest)
        if gate.declared > gate.max_bytes:
            raise tarfile.ReadError("endless padding")
        rest = file.read(_CHUNK)


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


def _zip_files(file: BinaryIO, gate: _Gate) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = gate.admit(member.filename, member.file_size, _zip_kind(member))
            if name is not None:
                with archive.open(member) as content:
                    # Asking for a byte more bounds the memory, and makes zipfile reach the end and check the sum.
                    data = content.read(member.file_size + 1)
                if len(data) != member.file_size:
                    raise zipfile.BadZipFile(f"{name!r} has {len(data):,} bytes, not the {member.file_size:,} declared")
                yield name, data


def _zip_kind(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "neither stored nor deflated"  # zipfile expands the other methods without a bound on memory
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 from tools that know no Unix modes
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a symbolic link" if kind == stat.S_IFLNK else "a device, fifo or other special file"
    return "folder" if member.is_dir() else "file"
