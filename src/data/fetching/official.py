"""Downloads the official archive of a data set, or the files of which it consists."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from filelock import FileLock

from src.configuration.schema import Official
from src.data.fetching.adopting import adopt
from src.data.fetching.download import fetch


def fetch_official(official: Official, archive: Path, partial_dir: Path) -> str:
    """Writes the official archive and returns its sha256; separate files become one tar, as a user's folder does.

    Raises:
        SourceError: a file can't be downloaded, or has another checksum.
    """
    if not official.files:
        return fetch(official.urls, archive, sha256=official.sha256, partial_dir=partial_dir)
    # A folder and a lock for this set of files: archives of two data sets may have the same name.
    key = hashlib.sha256("\n".join(official.files.values()).encode()).hexdigest()
    partial_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(partial_dir / f"{key}.lock"):
        folder = partial_dir / key / archive.stem
        for name, sha256 in official.files.items():
            mirrors = [f"{url.rstrip('/')}/{name}" for url in official.urls]
            fetch(mirrors, folder / name, sha256=sha256, partial_dir=partial_dir)
        digest = adopt(str(folder), archive, sha256=official.sha256, partial_dir=partial_dir)
        shutil.rmtree(folder.parent)
    return digest
