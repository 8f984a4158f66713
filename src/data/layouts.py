"""Recognises the layout of a user's folder, archive or table, from names and a few contents."""

from __future__ import annotations

import io
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from src.data.fetching.adopting import file_names
from src.data.fetching.archives import Archive
from src.data.fetching.files import SourceError, disk_errors
from src.data.folders import SPLIT_OF
from src.data.image_files import FORMATS
from src.data.image_files import SUFFIXES as IMAGES
from src.data.packed import SPLITS
from src.data.table_archives import is_archive, split_of
from src.data.table_files import SUFFIXES as TABLES
from src.data.table_files import Table, is_number, read_table

LONGEST_NAME = 60  # letters of a column's name
LOOKED_AT = 200  # images whose size is read
ENTITIES = (".txt", ".conll", ".iob", ".iob2", ".bio", ".tsv")
# Usual names of columns, the likeliest first.
TEXTS = ("text", "sentence", "review", "content", "body", "document", "comment", "message", "tweet")
LABELS = ("label", "class", "target", "category", "sentiment", "topic", "y", "species", "diagnosis")
GROUPS = ("group", "patient", "subject", "person", "author", "user", "session")
SPLIT_COLUMNS = ("split", "subset", "set", "part", "partition", "fold")

Name = Literal["boxes", "domains", "pairs", "images", "entities", "texts", "text_table", "numbers"]


class Sizes(NamedTuple):
    """What was seen of some images."""

    width: int  # median, in pixels
    height: int
    smallest: int  # side
    largest: int
    channels: int
    looked_at: int


@dataclass(frozen=True)
class Layout:
    """A layout that fits: what was found, and the keys of the data set that say so."""

    name: Name
    title: str
    counts: Mapping[str, Mapping[str, int]]  # examples by split ("" for none) and class ("" for none)
    keys: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # of a table: examples of values by name
    words: Sequence[int] = ()  # lengths of some texts

    def examples(self, split: str) -> int:
        return sum(self.counts.get(split, {}).values())

    @property
    def total(self) -> int:
        return sum(map(self.examples, self.counts))


class Files:
    """The files of a folder, an archive or a single table, by the names that they have in an archive.

    Raises:
        SourceError: there is nothing at the path, or it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: Callable[[str], bytes]
        if path.is_dir():
            with disk_errors(path):
                self.names = [f"{path.name}/{name}" for name in file_names(path)]
            self._read = lambda name: (path.parent / name).read_bytes()
        elif not path.is_file():
            raise SourceError(f"{path}: no such file or folder: give the path of your data")
        elif is_archive(path):
            archive = Archive(path)
            self.names = list(archive.places)
            self._read = archive.read
        else:
            self.names = [path.name]
            self._read = lambda _: path.read_bytes()
        self.names = [
            name for name in self.names if not any(part.startswith(".") for part in PurePosixPath(name).parts[1:])
        ]

    def read(self, name: str) -> bytes:
        with disk_errors(self.path):
            return self._read(name)

    def of(self, suffixes: Sequence[str]) -> list[str]:
        return [name for name in self.names if name.lower().endswith(tuple(suffixes))]

    @cached_property
    def images(self) -> list[str]:
        return self.of(IMAGES)

    @cached_property
    def tables(self) -> list[tuple[str, Table]]:
        return [(name, _with_header_or_without(self.read(name), name)) for name in self.of(TABLES)]


def _with_header_or_without(content: bytes, name: str) -> Table:
    """A table whose first row names its columns, unless a cell of it is a number or a long text."""
    table = read_table(content, name, has_header=None)
    has_header = not any(is_number(column) or len(column) > LONGEST_NAME for column in table.columns)
    return table if has_header or _is_numbered(table) else read_table(content, name, has_header=False)


def _is_numbered(table: Table) -> bool:
    """Whether the columns have numbers in place of names."""
    return table.columns == [str(number) for number in range(len(table.columns))]


def recognise(files: Files) -> list[Layout]:
    """The layouts that fit, the likeliest first.

    Raises:
        SourceError: a table is damaged.
    """
    candidates = (look(files) for look in (_boxes, _domains, _pairs, _manifest, _entities, _images, _texts, _table))
    return [layout for layout in candidates if layout is not None]


def _boxes(files: Files) -> Layout | None:
    if not files.images:
        return None
    layout = ""
    if any(b'"annotations"' in files.read(name) for name in files.of((".json",))):
        layout = "COCO's JSON"
    elif any(b"<annotation" in files.read(name)[:1000] for name in files.of((".xml",))[:3]):
        layout = "Pascal VOC's XML"
    elif any("labels" in PurePosixPath(name).parts for name in files.of((".txt",))):
        layout = "YOLO's text files"
    if not layout:
        return None
    counts = Counter(_split_in(name) for name in files.images)
    return Layout(
        "boxes", f"images with boxes in {layout}", {k: {"": n} for k, n in counts.items()}, sizes=_sizes(files)
    )


def _domains(files: Files) -> Layout | None:
    counts: dict[str, Counter[str]] = {}
    for name in files.images:
        parts = PurePosixPath(name).parts
        for depth, part in enumerate(parts[:-1]):
            if part[:-1] in SPLIT_OF and part[-1] in "AB":
                counts.setdefault(SPLIT_OF[part[:-1]], Counter())[part[-1]] += 1
            elif part in SPLIT_OF and depth == len(parts) - 2 and depth > 1:
                counts.setdefault(SPLIT_OF[part], Counter())[parts[depth - 1]] += 1
    domains = {domain for of_split in counts.values() for domain in of_split}
    if len(domains) != 2 or not all(len(of_split) == 2 for of_split in counts.values()) or _stems(files):
        return None
    return Layout("domains", "two domains of images without pairs", counts, sizes=_sizes(files))


def _stems(files: Files) -> Counter[tuple[str, str]]:
    """How many pictures in A/ and B/ have a name, by split and name; empty unless most names are in both."""
    stems: Counter[tuple[str, str]] = Counter()
    for name in files.images:
        path = PurePosixPath(name)
        folder = next((part for part in path.parts[:-1] if part in ("A", "B")), None)
        if folder:
            below = [part for part in path.with_suffix("").parts if part not in ("A", "B")]
            stems[_split_in(name), "/".join(below)] += 1
    return stems if stems and 2 * sum(count == 2 for count in stems.values()) > len(stems) else Counter()


def _pairs(files: Files) -> Layout | None:
    title = ""
    if stems := _stems(files):
        title, counts = "pairs of images in A/ and B/", Counter(split for split, _ in stems)
    else:
        direct = [name for name in files.images if PurePosixPath(name).parent.name in SPLIT_OF]
        shapes = [(width, height) for width, height, _ in _seen(files, direct[:20])]
        if shapes and all(width == 2 * height for width, height in shapes):
            title, counts = "pairs of images side by side", Counter(_split_in(name) for name in direct)
    if not title:
        return None
    sizes = _sizes(files)
    return Layout("pairs", title, {split: {"": count} for split, count in counts.items()}, sizes=sizes)


def _manifest(files: Files) -> Layout | None:
    if not files.images:
        return None
    for name, table in files.tables:
        above = PurePosixPath(name).parent
        images = set(files.images)
        for column in table.columns:
            paths = [str(value) for value in table.column(column)[:50]]
            if all((above / path).as_posix() in images for path in paths):
                if (label := _label_column(table, {column})) is None:
                    continue
                columns = {"file": column, "label": label, **_further_columns(table, label)}
                keys = {"manifest": PurePosixPath(name).name, "columns": columns}
                counts = _table_counts([("", table)], label, columns.get("split"))
                title = f"images by the manifest {PurePosixPath(name).name}"
                return Layout("images", title, counts, keys, _sizes(files), _examples(table))
    return None


def _images(files: Files) -> Layout | None:
    counts, title = _class_folders(files.images)
    return Layout("images", f"images in {title}", counts, sizes=_sizes(files)) if counts else None


def _texts(files: Files) -> Layout | None:
    names = files.of((".txt",))
    counts, title = _class_folders(names)
    if not counts:
        return None
    words = [len(files.read(name).split()) for name in names[:: max(1, len(names) // LOOKED_AT)]]
    return Layout("texts", f"texts in {title}", counts, words=words)


def _class_folders(names: Sequence[str]) -> tuple[dict[str, Counter[str]], str]:
    """Files by split and class, where they lie in class folders, and how that is called."""
    counts: dict[str, Counter[str]] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        if len(parts) > 2 and parts[-3] in SPLIT_OF:
            counts.setdefault(SPLIT_OF[parts[-3]], Counter())[parts[-2]] += 1
    if {"train", "test"} <= counts.keys() and len(counts["train"]) > 1:
        return counts, "class folders, SPLIT/CLASS/"
    if any(part in SPLIT_OF for name in names for part in PurePosixPath(name).parts[:-1]):
        return {}, ""
    alone = Counter(PurePosixPath(name).parent.as_posix() for name in names)
    above = {PurePosixPath(folder).parent for folder in alone}
    if len(alone) > 1 and len(above) == 1:
        return {"": Counter({PurePosixPath(folder).name: n for folder, n in alone.items()})}, "class folders, CLASS/"
    return {}, ""


def _entities(files: Files) -> Layout | None:
    counts: dict[str, dict[str, int]] = {}
    for name in files.of(ENTITIES):
        path = PurePosixPath(name)
        split = SPLIT_OF.get(path.stem.lower(), SPLIT_OF.get(path.suffix[1:], ""))
        lines = files.read(name).decode("utf-8-sig", "replace").split("\n") if split else []
        tagged = [line.split() for line in lines[:300] if line.strip()]
        if tagged and all(len(cells) > 1 and re.fullmatch(r"O|[BIESLU]-\S+", cells[-1]) for cells in tagged):
            counts[split] = {"": sum(not line.strip() for line in lines)}
    return Layout("entities", "sentences with entities in CoNLL's columns", counts) if "train" in counts else None


def _table(files: Files) -> Layout | None:
    if not files.tables:
        return None
    named = [(split_of(name), table) for name, table in files.tables]
    has_splits = any(split == "train" for split, _ in named)
    parts = [part for part in named if part[0]] if has_splits else [("", table) for _, table in named]
    table = parts[0][1]
    if all(is_number(value) for column in table.columns for value in table.column(column)[:1000]):
        rows = {split: {"": part.rows} for split, part in parts}
        return Layout("numbers", f"a table of {len(table.columns)} numbers", rows, columns=_examples(table))
    text = _text_column(table)
    label = _label_column(table, {text} if text else set())
    if text is None or label is None:
        return None
    columns = {"text": text, "label": label, **_further_columns(table, label)}
    words = [len(str(value).split()) for value in table.column(text)[:1000]]
    counts = _table_counts(parts, label, columns.get("split"))
    keys = {key: int(column) if _is_numbered(table) else column for key, column in columns.items()}
    return Layout("text_table", "texts in a table", counts, {"columns": keys}, None, _examples(table), words)


def _table_counts(parts: Sequence[tuple[str, Table]], label: str, split: str | None) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for name, table in parts:
        splits = [name] * table.rows if split is None else table.column(split)
        for value, of in zip(table.column(label), splits, strict=True):
            counts.setdefault(SPLIT_OF.get(str(of or "").strip().lower(), ""), Counter())[str(value)] += 1
    return counts


def _text_column(table: Table) -> str | None:
    """The column of that name, else the one with the longest texts."""
    lengths = {
        column: statistics.mean(len(value) for value in values)
        for column in table.columns
        if (values := [value for value in table.column(column)[:200] if isinstance(value, str)])
        and not all(map(is_number, values))
    }
    named = next((column for name in TEXTS for column in lengths if column.lower() == name), None)
    return named or max(lengths, key=lambda column: lengths[column], default=None)


def _label_column(table: Table, others: set[str]) -> str | None:
    """The column of that name, else the one with the fewest distinct values of those that repeat."""
    columns = [column for column in table.columns if column not in others | {_split_column(table)}]
    named = next((column for name in LABELS for column in columns if column.lower() == name), None)
    distinct = {column: len(set(map(str, table.column(column)[:1000]))) for column in columns}
    repeating = [column for column in columns if 2 <= distinct[column] <= min(table.rows, 1000) / 2]
    return named or min(repeating, key=lambda column: distinct[column], default=None)


def _split_column(table: Table) -> str | None:
    for column in table.columns:
        if column.lower() in SPLIT_COLUMNS:
            values = {str(value or "").strip().lower() for value in table.column(column)} - {""}
            if values and values <= SPLIT_OF.keys():
                return column
    return None


def _further_columns(table: Table, label: str) -> dict[str, str]:
    """The columns of splits and of groups, where there are some."""
    group = next((column for name in GROUPS for column in table.columns if column.lower() == name), label)
    columns = {"split": _split_column(table), "group": None if group == label else group}
    return {key: column for key, column in columns.items() if column is not None}


def _examples(table: Table) -> dict[str, str]:
    """A few values of each column."""
    return {column: ", ".join(_short(value) for value in table.column(column)[:3]) for column in table.columns}


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) < 30 else f"{text[:28]}…"


def _split_in(name: str) -> str:
    """The split that a folder above a file is named after, as `train`, `train2017` or `trainA`; or ""."""
    for part in reversed(PurePosixPath(name).parts[:-1]):
        match = re.fullmatch(r"([a-z]+)\d*[AB]?", part)
        if match and match[1] in SPLIT_OF:
            return SPLIT_OF[match[1]]
    return ""


def _seen(files: Files, names: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Width, height and mode of images; those that can't be read are passed over."""
    from PIL import Image

    for name in names:
        try:
            with Image.open(io.BytesIO(files.read(name)), formats=FORMATS) as image:
                yield (*image.size, image.mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue


def _sizes(files: Files) -> Sizes | None:
    seen = [*_seen(files, files.images[:: max(1, len(files.images) // LOOKED_AT)])]
    if not seen:
        return None
    widths, heights, modes = zip(*seen, strict=True)
    return Sizes(
        int(statistics.median(widths)),
        int(statistics.median(heights)),
        min(*widths, *heights),
        max(*widths, *heights),
        1 if all(mode in ("1", "L", "LA", "I", "I;16") for mode in modes) else 3,
        len(seen),
    )


def ordered(counts: Mapping[str, Any]) -> list[str]:
    """The splits of `counts` in their usual order."""
    return [split for split in ("", *SPLITS) if split in counts]
