"""Reads the examples of a user's folders, and counts all that is not used, with the reason.

`SPLIT/CLASS/file` for examples with a label, `SPLIT/file` for those without, below any folders.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from src.data.fetching.archives import Archive, read_archive
from src.data.fetching.files import SourceError
from src.data.packed import SPLITS

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
    has_splits: bool = True  # False: class folders alone, whose examples are those of the split ""

    def classes(self, archive: Path, pattern: str) -> list[str]:
        """The names of the classes, sorted.

        Raises:
            SourceError: `train` or `test` is missing (`pattern` says which files belong there), there are fewer than
                two classes, one of another split is not in `train`, or a name can't be printed.
        """
        for split in ("train", "test"):
            if not self.examples[split]:
                raise SourceError(f"{archive}: no {split}/<class>/{pattern}; see docs/your-data.md")
        labels = {split: {example.label for example in self.examples[split]} for split in SPLITS}
        return class_names(archive, labels, mark="/")


def class_names(archive: Path, labels: Mapping[str, Set[str]], mark: str = "") -> list[str]:
    """The names of the classes of train, sorted; `labels`: those of each split, `mark`: stands behind a split's name.

    Raises:
        SourceError: there are fewer than two, one of another split is not among them, or a name can't be printed.
    """
    classes = sorted(labels["train"])
    train = f"train{mark}"
    if not classes:
        raise SourceError(f"{archive}: {train} has no example: give at least two classes")
    if unprintable := [label for label in classes if not label.isprintable()]:
        raise SourceError(
            f"{archive}: {train} has the class {unprintable[0]!r}: rename it, a name must be printable UTF-8"
        )
    for split in ("val", "test"):
        if unknown := sorted(labels[split] - labels["train"]):
            more = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
            raise SourceError(
                f"{archive}: {split}{mark} has the class {unknown[0]!r} that {train} lacks; "
                f"{train} has {', '.join(classes[:10])}{more}"
            )
    if len(classes) < 2:
        raise SourceError(f"{archive}: {train} has only the class {classes[0]!r}: give at least two")
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
    may_lack_splits: bool = False,
) -> Folders[None]:
    """The examples of an archive by their names, without their content.

    Args:
        suffixes: those of examples, in lower case.
        has_classes: whether a split's folder holds a folder for each class.
        left_out: names of class folders that hold no examples, each with the reason.
        skipped: files that are passed over as if the archive did not have them.
        may_lack_splits: whether a folder of class folders is read where there is no folder of a split.

    Raises:
        SourceError: a class has no example, or two folders are the same split.
    """
    files = ((name, None) for name in archive.places if name not in skipped)
    root = _root_of_classes(archive, suffixes, skipped) if may_lack_splits else None
    return _sorted_into_splits(archive.path, files, lambda _, __: None, suffixes, has_classes, left_out, root)


def _root_of_classes(archive: Archive, suffixes: tuple[str, ...], skipped: Collection[str]) -> PurePosixPath | None:
    """The folder that holds the class folders, where no file lies in a folder of a split; None: some do.

    Raises:
        SourceError: the class folders lie in several folders.
    """
    folders: set[PurePosixPath] = set()  # those that hold a file of an example
    for name, place in archive.places.items():
        path = PurePosixPath(name)
        is_hidden = any(part.startswith(".") for part in path.parts[1:])
        if place is None or name in skipped or is_hidden or path.suffix.lower() not in suffixes:
            continue
        if _split_at(path.parts, 2) is not None:
            return None
        if len(path.parts) > 1:
            folders.add(path.parent)
    highest = min((len(folder.parts) for folder in folders), default=0)
    roots = sorted({folder.parent for folder in folders if len(folder.parts) == highest})
    if len(roots) > 1:
        raise SourceError(
            f"{archive.path}: class folders in {roots[0]}/ and in {roots[1]}/: call these train/ and test/ if they are "
            "splits, or put all class folders into one folder"
        )
    return roots[0] if roots else None


def _sorted_into_splits(
    archive: Path,
    files: Iterable[tuple[str, C]],
    read: Callable[[C, str], T],
    suffixes: tuple[str, ...],
    has_classes: bool,
    left_out: Mapping[str, str],
    root: PurePosixPath | None = None,
) -> Folders[T]:
    """Sorts files, names with what `read` takes; `root`: the folder of the class folders, where there are no splits."""
    folders: Folders[T] = Folders(has_splits=root is None)
    seen: dict[str, Counter[str]] = defaultdict(Counter)  # what is not used of each class folder, by reason
    names: dict[str, str] = {}  # the folder that a split was taken from
    used = set()
    listed, above = set(), set()  # folders that the archive lists, and those that hold something
    depth = 2 if has_classes else 1  # parts of a name below the folder that holds the splits' folders, but for the file
    for name, content in files:
        is_folder = name.endswith("/")
        parts = [*PurePosixPath(name).parts, ""] if is_folder else list(PurePosixPath(name).parts)
        above |= {path.as_posix() for path in PurePosixPath(name).parents}
        at = _split_at(parts, depth) if root is None else _below(root, parts)
        reason = _reason(parts, at, depth, suffixes, left_out)
        if reason is None and not is_folder:
            assert at is not None
            folder, label = "" if root is not None else parts[at], parts[at + 1] if has_classes else ""
            split = SPLIT_OF[folder] if folder else ""
            if names.setdefault(split, folder) != folder:
                raise SourceError(f"{archive}: both {names[split]}/ and {folder}/ are the {split} split: keep one")
            used.add("/".join(parts[: at + depth]))
            folders.examples[split].append(Example(name, label, read(content, f"{archive}: {name}")))
            continue
        if is_folder and reason != "hidden":
            listed.add(name.rstrip("/"))
        is_below = has_classes and at is not None and len(parts) > at + 2
        if at is not None and is_below and reason not in ("hidden", *left_out.values()):
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
        layout = "SPLIT/CLASS/" if root is None else "CLASS/"
        raise SourceError(
            f"{archive}: classes without an example: {facts}: files go into {layout} and end in "
            f"{', '.join(suffixes)}; convert or move them, or remove the folder"
        )
    for examples in folders.examples.values():
        examples.sort(key=lambda example: example.name)
    return folders


def _split_at(parts: Sequence[str], depth: int) -> int | None:
    """Where the name of the split's folder stands: at its place above the file, else the first; None: nowhere."""
    usual = len(parts) - 1 - depth
    if usual >= 0 and parts[usual] in SPLIT_OF:
        return usual
    return next((i for i, part in enumerate(parts[:-1]) if part in SPLIT_OF), None)


def _below(root: PurePosixPath, parts: Sequence[str]) -> int | None:
    """Where the name of `root` stands, -1 if it is the archive's top; None: the file does not lie in it."""
    depth = len(root.parts)
    return depth - 1 if tuple(parts[:depth]) == root.parts and len(parts) > depth else None


def _reason(
    parts: Sequence[str], at: int | None, depth: int, suffixes: tuple[str, ...], left_out: Mapping[str, str]
) -> str | None:
    """Why a file is not used; None: it is."""
    if any(part.startswith(".") for part in parts[1:]):
        return "hidden"
    if at is None:
        return "outside train/, val/ and test/"
    if len(parts) > at + 2 and parts[at + 1] in left_out:
        return left_out[parts[at + 1]]
    if len(parts) - 1 > at + depth:
        return "too deep"
    if len(parts) - 1 < at + depth:
        return "in no class folder"
    return None if parts[-1].lower().endswith(suffixes) else "of another kind"
