"""Archives of every kind are read in their order; hostile and damaged ones are refused."""

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
from pathlib import Path
from typing import Any

import pytest

from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError

DATA = random.Random(0).randbytes(300_000)
ROOT = Path(__file__).parents[1]
FILES = [("top/b.txt", b"second in the alphabet"), ("top/a.bin", DATA), ("top/empty", b"")]


def tar_bytes(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
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


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """Reads hostile bytes as an archive and returns the message of the refusal, which names the archive."""

    def refusal(content: bytes, **limits: int) -> str:
        path = tmp_path / "archive.tar.gz"
        path.write_bytes(content)
        with pytest.raises(SourceError) as error:
            list(read_archive(path, **limits))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    return refusal


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_in_its_order_whatever_its_name(
    tmp_path: Path, pack: Callable[[bytes], bytes], format: int
) -> None:
    folder = tar_member("./top/", type=tarfile.DIRTYPE)
    path = tmp_path / "misnamed.zip"
    path.write_bytes(pack(tar_bytes(folder, *FILES, format=format)))
    assert list(read_archive(path)) == FILES


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_in_its_order_whatever_its_name(tmp_path: Path, method: int) -> None:
    path = tmp_path / "misnamed.tar.gz"
    path.write_bytes(zip_bytes(("top/", b""), *FILES, method=method))
    assert list(read_archive(path)) == FILES


def test_what_macos_adds_is_skipped(tmp_path: Path) -> None:
    junk = [("__MACOSX/top/._a", b"1"), ("top/._a", b"2"), ("top/.DS_Store", b"3")]
    (tmp_path / "tar").write_bytes(tar_bytes(*junk, *FILES))
    (tmp_path / "zip").write_bytes(zip_bytes(*junk, *FILES))
    assert list(read_archive(tmp_path / "tar")) == list(read_archive(tmp_path / "zip")) == FILES


ESCAPES = ["/etc/passwd", "../up", "a/../../up", "C:/windows", "c:evil", "..\\up", "a\\..\\..\\up", "\\\\host\\share"]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_lead_out_are_refused(refusal: Callable[..., str], name: str) -> None:
    for content in (tar_bytes((name, b"x")), zip_bytes((name, b"x"))):
        message = refusal(content)
        assert repr(name) in message and "leads out" in message


def test_a_name_that_occurs_twice_is_refused(refusal: Callable[..., str]) -> None:
    assert "'./a' occurs twice" in refusal(tar_bytes(("a", b"1"), ("./a", b"2")))
    with pytest.warns(UserWarning, match="Duplicate"):
        content = zip_bytes(("a", b"1"), ("a", b"2"))
    assert "'a' occurs twice" in refusal(content)


@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_bombs_are_refused_by_member_and_in_all(refusal: Callable[..., str], make: Callable[..., bytes]) -> None:
    content = make(("a", bytes(60_000)), ("b", bytes(60_000)))
    assert "'a' declares 60,000 bytes" in refusal(content, max_member_bytes=50_000)
    assert "'b' brings the content to more than the 100,000 bytes" in refusal(content, max_bytes=100_000)


def test_a_crowd_of_empty_members_counts_as_content(refusal: Callable[..., str]) -> None:
    content = gzip.compress(tar_bytes(*(tar_member(f"d{i}", type=tarfile.DIRTYPE) for i in range(1000))))
    assert "100,000 bytes allowed" in refusal(content, max_bytes=100_000)


def test_an_enormous_header_is_refused_before_it_is_held(refusal: Callable[..., str]) -> None:
    content = gzip.compress(tar_bytes(("n" * 2_000_000, b"x"), format=tarfile.GNU_FORMAT))
    assert "a header of more than" in refusal(content)


def test_the_headers_of_many_members_are_no_enormous_header(tmp_path: Path) -> None:
    path = tmp_path / "tar"
    path.write_bytes(tar_bytes(*((f"{i}", b"") for i in range(3000))))
    assert len(list(read_archive(path))) == 3000


def test_headers_nested_without_end_are_refused(refusal: Callable[..., str]) -> None:
    header = tar_member("x", type=tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    assert "damaged" in refusal(header * 1500)


@pytest.mark.parametrize(
    ("kind", "said"), [(tarfile.REGTYPE, "'a' declares -"), (tarfile.GNUTYPE_LONGNAME, "header of")]
)
def test_a_negative_size_is_refused(refusal: Callable[..., str], kind: bytes, said: str) -> None:
    header = bytearray(tar_member("a", type=kind).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xf0\x00"  # -4096 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert said in refusal(bytes(header) + bytes(10_240))


def test_endless_padding_is_refused(refusal: Callable[..., str]) -> None:
    assert "padding" in refusal(tar_bytes(*FILES) + bytes(1_000_000), max_bytes=1_000_000)


def test_a_sparse_tar_member_is_refused(refusal: Callable[..., str]) -> None:
    sparse = {"GNU.sparse.map": "0,0", "GNU.sparse.numblocks": "1", "GNU.sparse.size": "1000000000"}
    assert "'a' is a sparse file" in refusal(tar_bytes(tar_member("a", pax_headers=sparse)))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_a_truncated_tar_is_refused_wherever_it_ends(
    refusal: Callable[..., str], pack: Callable[[bytes], bytes]
) -> None:
    whole = pack(tar_bytes(*FILES))
    for end in (1, 100, 512, 1024, len(whole) // 2, len(whole) // 512 * 512 - 10_240, len(whole) - 10_000):
        message = refusal(whole[:end])
        assert "truncated" in message and "fetch it again" in message


def test_a_tar_that_ends_between_two_members_is_refused(refusal: Callable[..., str]) -> None:
    cut = tar_bytes(("a", b"1"))[:1024]
    assert "its end is missing" in refusal(cut)


def test_a_damaged_header_is_not_taken_for_the_end(refusal: Callable[..., str]) -> None:
    content = bytearray(tar_bytes(("a", b"1"), ("b", b"2")))
    content[1024] ^= 1
    assert "a header is damaged" in refusal(bytes(content))


def test_a_damaged_sum_at_the_end_of_gzip_is_found(refusal: Callable[..., str]) -> None:
    content = bytearray(gzip.compress(tar_bytes(*FILES)))
    content[-8] ^= 1
    assert "damaged" in refusal(bytes(content))


def test_a_truncated_zip_is_refused(refusal: Callable[..., str]) -> None:
    whole = zip_bytes(*FILES)
    for end in (4, len(whole) // 2, len(whole) - 1):
        assert "truncated" in refusal(whole[:end])


def test_a_flipped_bit_in_a_zip_is_found(refusal: Callable[..., str]) -> None:
    content = bytearray(zip_bytes(*FILES, method=zipfile.ZIP_STORED))
    content[content.index(DATA[:50])] ^= 1
    assert "damaged" in refusal(bytes(content))


@pytest.mark.parametrize("declared", [0, 10, 90_000])
def test_a_zip_member_that_lies_about_its_size_is_refused(refusal: Callable[..., str], declared: int) -> None:
    content = bytearray(zip_bytes(("a", bytes(50_000))))
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = declared.to_bytes(4, "little")
    assert "damaged" in refusal(bytes(content))


def test_an_encrypted_zip_member_is_refused(refusal: Callable[..., str]) -> None:
    content = bytearray(zip_bytes(("a", b"secret")))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert "'a' is encrypted" in refusal(bytes(content))


def test_a_zip_method_that_cannot_be_bounded_is_refused(refusal: Callable[..., str]) -> None:
    assert "neither stored nor deflated" in refusal(zip_bytes(("a", bytes(50_000)), method=zipfile.ZIP_BZIP2))


@pytest.mark.parametrize(
    "content",
    [tar_bytes(), zip_bytes(), zip_bytes(("top/", b"")), tar_bytes(("._a", b""))],
    ids=["tar", "zip", "folder only", "junk only"],
)
def test_an_archive_without_a_file_is_refused(refusal: Callable[..., str], content: bytes) -> None:
    assert "holds no file" in refusal(content)


@pytest.mark.parametrize(
    "content", [b"", b"hello", DATA, gzip.compress(b"not a tar")], ids=["empty", "text", "noise", "another gzip"]
)
def test_what_is_no_archive_is_refused(refusal: Callable[..., str], content: bytes) -> None:
    assert "no archive" in refusal(content)


def test_a_web_page_in_place_of_an_archive_is_named(refusal: Callable[..., str]) -> None:
    assert "web page" in refusal(b"<!doctype html><html></html>")


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"no archive at {tmp_path}/none"):
        list(read_archive(tmp_path / "none"))


def test_importing_the_module_is_light() -> None:
    program = (
        "import sys, src.data.fetching.archives; print([m for m in ('torch', 'requests', 'rich') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
