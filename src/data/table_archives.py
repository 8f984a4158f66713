"""The table files of an archive, or one table file in place of an archive, and the split of each."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from src.data.fetching.archives import read_archive
from src.data.fetching.files import disk_errors
from src.data.folders import SPLIT_OF
from src.data.table_files import SUFFIXES

_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh")


def read_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the files of an archive; a bare table file is its only one.

    A bare file has lost its name: its content tells its format, and so the suffix of the name that is yielded.

    Raises:
        SourceError: there is no archive, or it is damaged.
    """
    if not archive.is_file() or is_archive(archive):
        yield from read_archive(archive)
        return
    with disk_errors(archive):
        content = archive.read_bytes()
    yield f"table{_suffix(content)}", content


def is_archive(path: Path) -> bool:
    with disk_errors(path), path.open("rb") as file:
        head = file.read(6)
    return head.startswith(_COMPRESSED) or zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def _suffix(content: bytes) -> str:
    if content.startswith(b"PAR1"):
        return ".parquet"
    return ".jsonl" if content[:100].lstrip(b"\xef\xbb\xbf \r\n").startswith(b"{") else ".csv"


def is_table(name: str) -> bool:
    """Whether a file is a table by its name."""
    return name.lower().endswith(SUFFIXES)


def split_of(name: str) -> str:
    """The split that the name of a file or of its folder tells, or "".

    E.g. of `test.csv`, `train-00000-of-00002.parquet`, `reviews_dev.tsv`, `validation/0.jsonl`.
    """
    path = PurePosixPath(name)
    words = {SPLIT_OF[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_OF}
    if len(words) == 1:
        return words.pop()
    return SPLIT_OF.get(path.parent.name.lower(), "")
