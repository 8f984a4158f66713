"""Reads the examples of a user's folders, and counts all that is not used, with the reason.

`SPLIT/CLASS/file` for examples with a label, `SPLIT/file` for those without, below any folders.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from src.data.fetching.archives import Archive, read_archive
from src.data.fetching.files import SourceError

T = TypeVar("T")
C = TypeVar("C")
SPLIT_OF = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Example(Generic[T]):
    """One file of a split: its name in the archive, the name of its class ('' without classes) and its content."""

    name: str
    label: str
    content: T


@dataclass
class Folders(Generic[T]):
    """The examples of each split by name, and how many files or empty folders are not used, by reason."""

    examples: dict[str, list[Example[T]]] = field(default_factory=lambda: defaultdict(list))
    unused: Counter[str] = field(default_factory=Counter)

    def classes(self, archive: Path, pattern: str) -> list[str]:
        """The names of the classes, sorted.

        Raises:
            SourceError: `train` or `test` is missing (`pattern` says which files belong there), there are fewer than
                two classes, one of another split is not in `train`, or a name can't be printed.
        """
        for split in ("train", "test"):
            if not self.examples[split]:
                raise SourceError(f"{archive}: no {split}/<class>/{pattern}; see docs/your-data.md")
        classes = sorted({example.label for example in self.examples["train"]})
        if unprintable := [label for label in classes if not label.isprintable()]:
            raise SourceError(
                f"{archive}: train/ has the class {unprintable[0]!r}: rename it, a name must be printable UTF-8"
            )
        for split in ("val", "test"):
            if unknown := sorted({example.label for example in self.examples[split]} - set(classes)):
                raise SourceError(
                    f"{archive}: {split}/ has the class {unknown[0]!r} that train/ lacks; "
                    f"train/ has {', '.join(classes)}"
                )
        if len(classes) < 2:
            raise SourceError(f"{archive}: train/ has only the class {classes[0]!r}: give at least two")
        return classes


def read_folders(
    archive: Path,
    read: Callable[[bytes, str], T],
    suffixes: tuple[str, ...],
    *,
    has_classes: bool = True,
    left_out: Mapping[str, str] = {},
) -> Folders[T]:
    """Reads the examples of an archive with `read`, which takes a file's content and its name for messages.

    The arguments and errors are those of `list_folders`.
    """
    files = read_archive(archive, with_folders=True)
    return _sorted_into_splits(archive, files, read, suffixes, has_classes, left_out)


def list_folders(
    archive: Archive,
    suffixes: tuple[str, ...],
    *,
    has_classes: bool = True,
    left_out: Mapping[str, str] = {},
    skipped: Collection[str] = (),
) -> Folders[None]:
    """The examples of an archive by their names, without their content.

    Args:
        suffixes: those of examples, in lower case.
        has_classes: whether a split's folder holds a folder for each class.
        left_out: names of class folders that hold no examples, each with the reason.
        skipped: files that are passed over as if the archive did not have them.

    Raises:
        SourceError: a class has no example, or two folders are the same split.
    """
    files = ((name, None) for name in archive.places if name not in skipped)
    return _sorted_into_splits(archive.path, files, lambda _, __: None, suffixes, has_classes, left_out)


def _sorted_into_splits(
    archive: Path,
    files: Iterable[tuple[str, C]],
    read: Callable[[C, str], T],
    suffixes: tuple[str, ...],
    has_classes: bool,
    left_out: Mapping[str, str],
) -> Folders[T]:
    folders: Folders[T] = Folders()
    seen: dict[str, Counter[str]] = defaultdict(Counter)  # what is not used of each class folder, by reason
    names: dict[str, str] = {}  # the folder that a split was taken from
    used = set()
    listed, above = set(), set()  # folders that the archive lists, and those that hold something
    depth = 2 if has_classes else 1  # parts of a name below the folder that holds the splits' folders, but for the file
    for name, content in files:
        is_folder = name.endswith("/")
        parts = [*PurePosixPath(name).parts, ""] if is_folder else list(PurePosixPath(name).parts)
        above |= {path.as_posix() for path in PurePosixPath(name).parents}
        at = _split_at(parts, depth)
        reason = _reason(parts, at, depth, suffixes, left_out)
        if reason is None and not is_folder:
            folder, label = parts[at], parts[at + 1] if has_classes else ""
            split = SPLIT_OF[folder]
            if names.setdefault(split, folder) != folder:
                raise SourceError(f"{archive}: both {names[split]}/ and {folder}/ are the {split} split: keep one")
            used.add("/".join(parts[: at + depth]))
            folders.examples[split].append(Example(name, label, read(content, f"{archive}: {name}")))
            continue
        if is_folder and reason != "hidden":
            listed.add(name.rstrip("/"))
        is_class = has_classes and at >= 0 and len(parts) > at + 2 and reason not in ("hidden", *left_out.values())
        if is_class:
            seen["/".join(parts[: at + 2])][str(reason)] += not is_folder
        if not is_folder:
            folders.unused[str(reason)] += 1
    if empty := len(listed - above):
        folders.unused["empty folders"] = empty
    if without := sorted(seen.keys() - used):
        facts = "; ".join(
            f"{name} ({', '.join(f'{count} {reason}' for reason, count in (+seen[name]).items()) or 'empty'})"
            for name in without
        )
        raise SourceError(
            f"{archive}: classes without an example: {facts}: files go into SPLIT/CLASS/ and end in "
            f"{', '.join(suffixes)}; convert or move them, or remove the folder"
        )
    for examples in folders.examples.values():
        examples.sort(key=lambda example: example.name)
    return folders


def _split_at(parts: list[str], depth: int) -> int:
    """Where the name of the split's folder stands: at its place above the file, else the first; -1: nowhere."""
    usual = len(parts) - 1 - depth
    if usual >= 0 and parts[usual] in SPLIT_OF:
        return usual
    return next((i for i, part in enumerate(parts[:-1]) if part in SPLIT_OF), -1)


def _reason(
    parts: list[str], at: int, depth: int, suffixes: tuple[str, ...], left_out: Mapping[str, str]
) -> str | None:
    """Why a file is not used; None: it is."""
    if any(part.startswith(".") for part in parts[1:]):
        return "hidden"
    if at < 0:
        return "outside train/, val/ and test/"
    if len(parts) > at + 2 and parts[at + 1] in left_out:
        return left_out[parts[at + 1]]
    if len(parts) - 1 > at + depth:
        return "too deep"
    if len(parts) - 1 < at + depth:
        return "in no class folder"
    return None if parts[-1].lower().endswith(suffixes) else "of another kind"
