"""Reading of tars and zips; refusal of hostile and damaged ones. (Links and devices: tests/faults/test_hostile.py.)"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from src.data.fetching.archives import Archive, read_archive
from src.data.fetching.files import SourceError
from tests.tiny_data import write_tar

DATA = random.Random(0).randbytes(300_000)
ROOT = Path(__file__).parents[1]
FILES = [("top/b.txt", b"second in the alphabet"), ("top/a.bin", DATA), ("top/empty", b"")]


def tar_bytes(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files (name, content) and of headers, those with as many zeros as they declare."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(bytes(max(member.size, 0))))
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def tar_member(name: str, **attributes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


def zip_bytes(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content, compress_type=method)
    return buffer.getvalue()


def zip_member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def tar_header(name: str, size: bytes | None = None, **attributes: Any) -> bytes:
    """The 512 bytes of a member's header; `size` replaces its 12 bytes of the size, the checksum is correct."""
    header = bytearray(tar_member(name, **attributes).tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def flipped(content: bytes, *offsets: int) -> bytes:
    """`content` with the lowest bit flipped at these offsets."""
    damaged = bytearray(content)
    for offset in offsets:
        damaged[offset] ^= 1
    return bytes(damaged)


def zip_declaring(size: int) -> bytes:
    """A zip with one member of 50,000 bytes whose directory entry declares `size`, bytes."""
    content = bytearray(zip_bytes(("a", bytes(50_000))))
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    return bytes(content)


def in_any_order(path: Path) -> list[tuple[str, bytes]]:
    """The files of an archive, the last one read first, by four threads."""
    archive = Archive(path)
    names = [name for name, place in archive.places.items() if place is not None]
    with ThreadPoolExecutor(4) as pool:
        contents = dict(zip(names[::-1], pool.map(archive.read, names[::-1]), strict=True))
    return [(name, contents[name]) for name in names]


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """Reads bytes as an archive; returns the error message, one line that names the archive."""

    def refusal(content: bytes, **limits: Any) -> str:
        path = tmp_path / "archive.tar.gz"
        path.write_bytes(content)
        with pytest.raises(SourceError) as error:
            list(read_archive(path, **limits))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        if not limits:
            with pytest.raises(SourceError):
                in_any_order(path)
        return str(error.value)

    return refusal


# --- sound archives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress, bz2.compress])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_in_its_order_whatever_its_suffix(
    tmp_path: Path, compress: Callable[[bytes], bytes], format: int
) -> None:
    folder = tar_member("./top/", type=tarfile.DIRTYPE)
    path = tmp_path / "misnamed.zip"
    path.write_bytes(compress(tar_bytes(folder, *FILES, format=format)))
    assert list(read_archive(path)) == in_any_order(path) == FILES


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_in_its_order_whatever_its_suffix(tmp_path: Path, method: int) -> None:
    path = tmp_path / "misnamed.tar.gz"
    path.write_bytes(zip_bytes(("top/", b""), *FILES, method=method))
    assert list(read_archive(path)) == in_any_order(path) == FILES


def test_files_that_macos_adds_are_skipped(tmp_path: Path) -> None:
    junk = [("__MACOSX/top/._a", b"1"), ("top/._a", b"2"), ("top/.DS_Store", b"3")]
    (tmp_path / "tar").write_bytes(tar_bytes(*junk, *FILES))
    (tmp_path / "zip").write_bytes(zip_bytes(*junk, *FILES))
    assert list(read_archive(tmp_path / "tar")) == list(read_archive(tmp_path / "zip")) == FILES


def test_the_headers_of_many_members_are_no_oversized_header(tmp_path: Path) -> None:
    path = tmp_path / "tar"
    path.write_bytes(tar_bytes(*((f"{i}", b"") for i in range(3000))))
    assert len(list(read_archive(path))) == 3000


# --- refusals ---------------------------------------------------------------------------------------------------------


# POSIX and relative names that lead out: tests/faults/test_hostile.py.
@pytest.mark.parametrize("name", ["a/../../up", "C:/windows", "c:evil", "a\\..\\..\\up", "\\\\host\\share"])
def test_names_that_lead_out_are_refused(refusal: Callable[..., str], name: str) -> None:
    for content in (tar_bytes((name, b"x")), zip_bytes((name, b"x"))):
        message = refusal(content)
        assert repr(name) in message and "leads out" in message


def test_a_name_that_occurs_twice_is_refused(refusal: Callable[..., str]) -> None:
    assert "'./a' occurs twice" in refusal(tar_bytes(("a", b"1"), ("./a", b"2")))
    with pytest.warns(UserWarning, match="Duplicate"):
        content = zip_bytes(("a", b"1"), ("a", b"2"))
    assert "'a' occurs twice" in refusal(content)


@pytest.mark.parametrize("archive_of", [tar_bytes, zip_bytes])
def test_a_member_and_the_total_are_limited(refusal: Callable[..., str], archive_of: Callable[..., bytes]) -> None:
    content = archive_of(("a", bytes(60_000)), ("b", bytes(60_000)))
    assert "'a' declares 60,000 bytes" in refusal(content, max_member_bytes=50_000)
    assert "'b' brings the content to more than the 100,000 bytes" in refusal(content, max_bytes=100_000)


STORED = zip_bytes(*FILES, method=zipfile.ZIP_STORED)
SECRET = zip_bytes(("a", b"secret"))
SPARSE = {"GNU.sparse.map": "0,0", "GNU.sparse.numblocks": "1", "GNU.sparse.size": "1000000000"}
NEGATIVE = b"\xff" * 10 + b"\xf0\x00"  # -4096 in base 256
MAX_BYTES = 1_000_000
REFUSED: dict[str, tuple[bytes, str]] = {
    "many empty members": (
        gzip.compress(tar_bytes(*(tar_member(f"d{i}", type=tarfile.DIRTYPE) for i in range(2000)))),
        "1,000,000 bytes allowed",
    ),
    "oversized header": (
        gzip.compress(tar_bytes(("n" * 2_000_000, b"x"), format=tarfile.GNU_FORMAT)),
        "a header of more than",
    ),
    "nested headers": (tar_header("x", type=tarfile.XHDTYPE) * 1500, "damaged"),
    "negative size": (tar_header("a", NEGATIVE) + bytes(10_240), "'a' declares -"),
    "negative size of a name": (
        tar_header("a", NEGATIVE, type=tarfile.GNUTYPE_LONGNAME) + bytes(10_240),
        "header of",
    ),
    "padding without end": (tar_bytes(*FILES) + bytes(MAX_BYTES), "padding"),
    "sparse member": (tar_bytes(tar_member("a", pax_headers=SPARSE)), "'a' is a sparse file"),
    "end between two members": (tar_bytes(("a", b"1"))[:1024], "its end is missing"),
    "damaged header": (flipped(tar_bytes(("a", b"1"), ("b", b"2")), 1024), "a header is damaged"),
    "damaged gzip checksum": (flipped(gzip.compress(tar_bytes(*FILES)), -8), "damaged"),
    "damaged zip member": (flipped(STORED, STORED.index(DATA[:50])), "damaged"),
    "zip that declares 0 bytes": (zip_declaring(0), "damaged"),
    "zip that declares too little": (zip_declaring(10), "damaged"),
    "zip that declares too much": (zip_declaring(90_000), "damaged"),
    "encrypted zip member": (flipped(SECRET, 6, SECRET.index(b"PK\x01\x02") + 8), "'a' is encrypted"),
    "zip method without a size limit": (
        zip_bytes(("a", bytes(50_000)), method=zipfile.ZIP_BZIP2),
        "neither stored nor deflated",
    ),
    "empty tar": (tar_bytes(), "holds no file"),
    "empty zip": (zip_bytes(), "holds no file"),
    "only a folder": (zip_bytes(("top/", b"")), "holds no file"),
    "only junk": (tar_bytes(("._a", b"")), "holds no file"),
    "empty file": (b"", "no archive"),
    "text": (b"hello", "no archive"),
    "noise": (DATA, "no archive"),
    "gzip without a tar": (gzip.compress(b"not a tar"), "no archive"),
    "web page": (b"<!doctype html><html></html>", "web page"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_or_damaged_archive_is_refused(refusal: Callable[..., str], name: str) -> None:
    content, message = REFUSED[name]
    assert message in refusal(content, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_a_truncated_tar_is_refused_wherever_it_ends(
    refusal: Callable[..., str], compress: Callable[[bytes], bytes]
) -> None:
    content = compress(tar_bytes(*FILES))
    for end in (1, 100, 512, 1024, len(content) // 2, len(content) // 512 * 512 - 10_240, len(content) - 10_000):
        message = refusal(content[:end])
        assert "truncated" in message and "fetch it again" in message


def test_a_truncated_zip_is_refused(refusal: Callable[..., str]) -> None:
    content = zip_bytes(*FILES)
    for end in (4, len(content) // 2, len(content) - 1):
        assert "truncated" in refusal(content[:end])


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"no archive at {tmp_path}/none"):
        list(read_archive(tmp_path / "none"))


def test_reading_archives_imports_neither_torch_nor_requests_nor_rich() -> None:
    program = (
        "import sys, src.data.fetching.archives; print([m for m in ('torch', 'requests', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def nested_tar(folder: Path, inner: dict[str, bytes]) -> Path:
    """A tar with a zip of these members and a file before and after it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in inner.items():
            archive.writestr(name, value)
    return write_tar(folder / "a.tar", {"s/a.txt": b"a", "s/in.zip": content.getvalue(), "s/z.txt": b"z"})


def test_zips_in_a_tar_are_folders_where_asked_for(tmp_path: Path) -> None:
    path = nested_tar(tmp_path, {"one/1.txt": b"1" * 1000, "2.txt": b"2"})
    expected = {"s/a.txt": b"a", "s/in.zip/one/1.txt": b"1" * 1000, "s/in.zip/2.txt": b"2", "s/z.txt": b"z"}
    assert dict(read_archive(path, nested=True)) == expected
    archive = Archive(path, nested=True)
    assert {name: archive.read(name) for name in reversed(expected)} == expected
    assert [name for name, _ in read_archive(path)] == ["s/a.txt", "s/in.zip", "s/z.txt"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../x", "C:\\x"])
def test_a_hostile_name_in_a_nested_zip_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="leads out of the archive"):
        list(read_archive(nested_tar(tmp_path, {name: b"x"}), nested=True))


def test_a_nested_zip_counts_towards_the_size_allowed(tmp_path: Path) -> None:
    path = nested_tar(tmp_path, {"big": b"0" * 5000})
    with pytest.raises(SourceError, match="declares 5,000 bytes, more than the 4,000 allowed"):
        list(read_archive(path, nested=True, max_member_bytes=4000))
