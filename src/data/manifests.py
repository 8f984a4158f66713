"""Manifests: a table with a row for each example, which names its file, its class and perhaps its split and group."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError
from src.data.folders import Example, Folders
from src.data.table_files import SUFFIXES, cell_text, read_table


class Manifest(NamedTuple):
    """The examples of a manifest in its order, the splits and groups that it names, and what is not used."""

    folders: Folders[None]  # without examples: what the archive holds besides
    examples: list[Example[None]]
    splits: list[Any] | None
    groups: list[Any] | None


def list_manifest(
    archive: Archive,
    manifest: str,
    *,
    file: str,
    label: str,
    split: str | None,
    group: str | None,
    skipped: Collection[str] = (),
) -> Manifest:
    """Reads the manifest of an archive; `file`, `label`, `split` and `group` are the names of its columns.

    The path of a file is relative to the manifest. `skipped` are files whose rows are passed over.

    Raises:
        SourceError: there is no such manifest or column, a row has no label, or its file is not in the archive or
            stands in an earlier row.
    """
    at = _find(archive, manifest)
    table = read_table(archive.read(at), f"{archive.path}: {at}")
    names, labels = table.column(file), [cell_text(value) for value in table.column(label)]
    splits, groups = (None if column is None else table.column(column) for column in (split, group))
    above = PurePosixPath(at).parent
    examples: list[Example[None]] = []
    rows: list[int] = []
    seen: dict[str, int] = {}
    for row, (path, name_of_class) in enumerate(zip(names, labels, strict=True)):
        name = _normal(above, cell_text(path))
        if archive.places.get(name) is None:
            raise SourceError(
                f"{table.place(row)}: the file {cell_text(path)!r} is not in the archive: "
                f"give its path from the folder of {above.name or manifest}"
            )
        if (first := seen.setdefault(name, row)) != row:
            raise SourceError(
                f"{table.place(row)}: {cell_text(path)!r} stands already in {table.place(first)}: keep one"
            )
        if not name_of_class:
            raise SourceError(f"{table.place(row)}: no {label}: give the name of a class, or remove the row")
        if name not in skipped:
            examples.append(Example(name, name_of_class, None))
            rows.append(row)
    folders: Folders[None] = Folders()
    if others := sum(place is not None for place in archive.places.values()) - len(seen) - 1:
        folders.unused["not in the manifest"] = others
    return Manifest(
        folders,
        examples,
        None if splits is None else [cell_text(splits[row]) for row in rows],
        None if groups is None else [groups[row] for row in rows],
    )


def _find(archive: Archive, manifest: str) -> str:
    """The archive's name of the manifest: a path from its top, or a part of one that only one file ends in."""
    parts = PurePosixPath(manifest).parts
    names = [name for name in archive.places if PurePosixPath(name).parts[-len(parts) :] == parts]
    if len(names) == 1:
        return names[0]
    if names:
        raise SourceError(f"{archive.path}: data.manifest={manifest}: {' and '.join(names)}: give more of the path")
    tables = [name for name in archive.places if PurePosixPath(name).suffix.lower() in SUFFIXES]
    remedy = f"its tables are {', '.join(tables[:5])}" if tables else f"give one that ends in {', '.join(SUFFIXES)}"
    raise SourceError(f"{archive.path}: data.manifest={manifest}: no such file in it: {remedy}")


def _normal(folder: PurePosixPath, path: str) -> str:
    """The archive's name of a path relative to a folder of the archive; "" where it leads out of the archive."""
    parts: list[str] = list(folder.parts)
    for part in PurePosixPath(path.replace("\\", "/")).parts:
        if part == "..":
            if not parts:
                return ""
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)
