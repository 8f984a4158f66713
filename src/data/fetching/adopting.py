"""Brings the archive, folder or address of `data.archive` to its place."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from src.common.files import replacing_path
from src.common.paths import input_path
from src.data.fetching.download import fetch
from src.data.fetching.files import SourceError, disk_errors, expect_sha256, is_junk


def adopt(archive: str, destination: Path, *, sha256: str | None, partial_dir: Path) -> str:
    """Brings the value of `data.archive` to `destination` and returns the sha256 of the result.

    A URL is downloaded; a file is copied; a folder becomes an uncompressed tar of its files and empty folders under one
    top folder of its name, whose bytes depend only on their names and contents. Links are followed. `sha256`, unless
    None, is the expected one of the result.

    Raises:
        SourceError: it does not exist, cannot be read, has another sha256, or the folder holds a loop of links,
            a link to nothing, a special file, or no file.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", archive):
        return fetch([archive], destination, sha256=sha256, partial_dir=partial_dir)
    path = Path(os.path.abspath(input_path(archive)))
    if not path.exists():
        raise SourceError(
            f"data.archive={archive}: nothing at {path} (working directory {Path.cwd()}): "
            "give the path of a file or folder, or an https address"
        )
    with disk_errors(destination):
        if path.is_dir():
            if destination.resolve().is_relative_to(path.resolve()):
                raise SourceError(
                    f"data.archive={archive} holds {destination}, its own destination: name another folder"
                )
            files = file_names(path)
            destination.parent.mkdir(parents=True, exist_ok=True)
            with replacing_path(destination) as temporary:
                _write_tar(path, files, temporary)
                return expect_sha256(temporary, sha256, f"the tar of {path}")
        if not path.is_file():
            raise SourceError(f"data.archive={archive}: {path} is neither a file nor a folder: give one of them")
        if destination.exists() and path.samefile(destination):
            return expect_sha256(destination, sha256, str(path))
        destination.parent.mkdir(parents=True, exist_ok=True)
        with replacing_path(destination) as temporary:
            shutil.copyfile(path, temporary)
            return expect_sha256(temporary, sha256, str(path))


def file_names(folder: Path) -> list[str]:
    """The relative posix names of the files in `folder`, sorted; of empty folders too, with "/" at the end.

    Links are followed: DVC's symlink cache consists of them.

    Raises:
        SourceError: a link leads nowhere or into a loop, there is a special file, or no file at all.
    """
    names = list(_names(folder, folder, ()))
    if all(name.endswith("/") for name in names):
        raise SourceError(f"{folder} holds no file: name the folder that holds the data")
    return sorted(names)


def _names(folder: Path, root: Path, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The names below `folder`, relative to `root`; `above`: device and inode of the folders that lead to it."""
    facts = folder.stat()
    if (identity := (facts.st_dev, facts.st_ino)) in above:
        raise SourceError(f"{folder} leads back to a folder above it: remove the link")
    is_empty = True
    for path in folder.iterdir():
        if path.is_dir():
            is_empty = False
            yield from _names(path, root, (*above, identity))
        elif path.is_file():
            name = path.relative_to(root)
            if not is_junk(PurePosixPath(name)):
                is_empty = False
                yield name.as_posix()
        else:
            kind = "a link that leads to no file" if path.is_symlink() else "a special file"
            raise SourceError(f"{path} is {kind}: a data folder may hold only files and folders, replace it")
    if is_empty and folder != root:
        yield f"{folder.relative_to(root).as_posix()}/"


def _write_tar(folder: Path, names: Sequence[str], target: Path) -> None:
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(f"{folder.name}/{name}")  # mtime, uid and gid 0, mode 0644
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
                continue
            with (folder / name).open("rb") as file:
                member.size = os.fstat(file.fileno()).st_size
                tar.addfile(member, file)
