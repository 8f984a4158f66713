"""The report of a packed data set: what was measured, put into figures, tables and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.common.identity import data_digest
from src.data import packed
from src.describing import Description, Examined, Shown, load, reference
from src.describing.drift import compare, may_differ
from src.describing.duplicates import Duplicates, find
from src.describing.stored import StoredSplit

if TYPE_CHECKING:
    from pyarrow import Table

FACTS = (
    "facts.parquet"  # beside meta.json: of each example the name, and of images the size, mode and bytes of the file
)
FACT_TITLES = {
    "width": "width of the file's picture, pixels",
    "height": "height of the file's picture, pixels",
    "bytes": "size of the file, bytes",
}
IMBALANCE = 10.0  # examples of the largest class for one of the smallest, from which on it is a warning
FEW = 10  # test examples of a class below which its figures are chance
COMMON = 0.1  # share of near-duplicates from which on they may be no copies
CHANCE = "look at the page's pairs: plain motifs, such as digits, are that alike by chance"
BINS = 40
PAIRS = 12  # near-duplicates that are shown
QUANTILES = {"min": 0.0, "median": 0.5, "max": 1.0}


@dataclass(frozen=True)
class Histogram:
    """A numeric feature: what it is, its statistics by split, and the share of each bin by split."""

    name: str
    title: str
    edges: np.ndarray  # float64 [BINS + 1]
    shares: Mapping[str, np.ndarray]
    statistics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ShownPair:
    """Two pictures that are nearly equal, uint8 [H, W, 3], with their names and their likeness."""

    names: tuple[str, str]
    examples: tuple[np.ndarray, np.ndarray]
    likeness: float


@dataclass(frozen=True)
class Report:
    """All that the page, the summary and the metrics say of a data set."""

    name: str
    profile: str
    meta: Mapping[str, Any]
    description: Description
    splits: Mapping[str, Examined]
    duplicates: Duplicates
    histograms: Sequence[Histogram]
    warnings: Sequence[str]
    pairs: Sequence[ShownPair]
    samples: Mapping[str, Sequence[Shown]]  # of each class, from train

    @property
    def is_sample(self) -> bool:
        """Whether the data are the embedded sample."""
        return self.profile == "sample"

    @property
    def classes(self) -> dict[str, dict[str, int]]:
        """Class -> split -> its examples, objects or entities; empty without classes."""
        counts = {split: examined.categories.get(self.description.label, {}) for split, examined in self.splits.items()}
        names = dict.fromkeys(name for split in counts.values() for name in split)
        return {name: {split: counted.get(name, 0) for split, counted in counts.items()} for name in names}

    @property
    def left_out(self) -> dict[str, int]:
        """Files of the archive that are not in the data, by reason."""
        bad = self.meta.get("bad", [])
        return {**self.meta.get("unused", {}), **({"can't be read": len(bad)} if bad else {})}

    def metrics(self) -> dict[str, Any]:
        """The figures for DVC; `data` identifies the packed splits."""
        sizes = {split: len(examined) for split, examined in self.splits.items()}
        return {
            "profile": self.profile,
            "data": data_digest(self.meta),
            "examples": sizes,
            "classes": len(self.classes),
            "imbalance": imbalance(self.classes),
            "duplicates": _within_and_between(self.duplicates.equal),
            "near_duplicates": _within_and_between(self.duplicates.near),
            "disagreeing_labels": self.duplicates.disagreeing,
            "left_out": sum(self.left_out.values()),
            "warnings": len(self.warnings),
        }

    def features(self) -> list[dict[str, Any]]:
        """A row for each numeric feature and split, and for each further figure, for DVC's plot."""
        statistics = [
            {"feature": histogram.name, "split": split, **values}
            for histogram in self.histograms
            for split, values in histogram.statistics.items()
        ]
        figures = [
            {"feature": name, "split": split, "mean": value}
            for split, examined in self.splits.items()
            for name, value in examined.figures.items()
        ]
        return statistics + figures

    def counts(self) -> list[dict[str, Any]]:
        """A row for each split and class, for DVC's plot."""
        if not self.classes:
            return [{"split": split, "class": "all", "count": len(examined)} for split, examined in self.splits.items()]
        return [
            {"split": split, "class": name, "count": count}
            for name, counts in self.classes.items()
            for split, count in counts.items()
        ]


def _within_and_between(counts: Mapping[str, int]) -> dict[str, int]:
    """Duplicates within all splits, and between any two."""
    between = sum(count for key, count in counts.items() if "/" in key)
    return {"within": sum(counts.values()) - between, "between": between}


def examine(
    folder: Path, other: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, StoredSplit], dict[str, Examined]]:
    """Measures a packed data set; returns its meta, and its splits as stored and as examined.

    `other`: the meta of the data that it will be compared with.

    Raises:
        PackedError: a split is missing or damaged.
    """
    meta = packed.read_meta(folder)
    description = load(meta["kind"])
    names = [*packed.SPLITS, *sorted(meta["splits"].keys() - set(packed.SPLITS))]
    stored = {name: StoredSplit(folder, name, meta) for name in names}
    examined = {name: description.examine(split, meta, other) for name, split in stored.items()}
    return meta, stored, with_facts(examined, read_facts(folder, *FACT_TITLES, "mode"))


def build(folder: Path, name: str, profile: str) -> Report:
    """The report of a packed data set.

    Raises:
        PackedError: a split is missing or damaged.
    """
    meta, stored, splits = examine(folder)
    description = load(meta["kind"])
    duplicates = find(splits)
    members = next(iter(splits.values())).members
    return with_warnings(
        Report(
            name=name,
            profile=profile,
            meta=meta,
            description=description,
            splits=splits,
            duplicates=duplicates,
            histograms=list(_histograms(splits, {**description.titles, **FACT_TITLES})),
            warnings=[],
            pairs=list(_shown_pairs(duplicates, splits, read_facts(folder, "name"))),
            samples={
                label: description.shown(stored["train"], meta, rows.tolist())
                for label, rows in members.items()
                if len(rows)
            },
        )
    )


def with_warnings(report: Report) -> Report:
    """The report with its warnings, the gravest first."""
    lines = [*_leaks(report), *_labels(report), *_files(report), *_balance(report), *_unlike(report)]
    lines += [*_repeated(report), *report.description.advice(report.splits, report.meta)]
    return replace(report, warnings=lines)


# --- facts of the files -----------------------------------------------------------------------------------------------


def read_facts(folder: Path, *columns: str) -> dict[str, Table]:
    """Split -> columns of the facts of its examples in their order, if there are any; empty without facts."""
    path = folder / FACTS
    if not path.is_file():
        return {}
    import pyarrow.compute
    import pyarrow.parquet

    names = [name for name in pyarrow.parquet.read_schema(path).names if name in ("split", *columns)]
    table = pyarrow.parquet.read_table(path, columns=names)
    owners = table["split"].cast("string")
    return {
        split: table.filter(pyarrow.compute.equal(owners, split)).drop_columns("split")
        for split in owners.unique().to_pylist()
    }


def with_facts(splits: Mapping[str, Examined], facts: Mapping[str, Table]) -> dict[str, Examined]:
    """The splits with what is known of their files: numbers as numeric features, texts as categorical ones."""
    joined = dict(splits)
    for split, table in facts.items():
        numbers, categories = dict(splits[split].numbers), dict(splits[split].categories)
        for name in table.column_names:
            column = table[name].drop_null()
            values = column.to_numpy()
            if values.dtype.kind in "iuf":
                numbers[name] = values.astype(np.float32)
            else:
                counts = {str(entry["values"]): entry["counts"] for entry in column.value_counts().to_pylist()}
                categories[name] = dict(sorted(counts.items()))
        joined[split] = replace(splits[split], numbers=numbers, categories=categories)
    return joined


# --- statistics -------------------------------------------------------------------------------------------------------


def _histograms(splits: Mapping[str, Examined], titles: Mapping[str, str]) -> Iterator[Histogram]:
    """The numeric features that any split has."""
    names = dict.fromkeys(name for examined in splits.values() for name in examined.numbers)
    for name in names:
        values = {s: examined.numbers[name] for s, examined in splits.items() if len(examined.numbers.get(name, ()))}
        if not values:
            continue
        low = min(float(part.min()) for part in values.values())
        high = max(float(part.max()) for part in values.values())
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        yield Histogram(
            name,
            titles.get(name, name),
            edges,
            {split: np.histogram(part, edges)[0] / len(part) for split, part in values.items()},
            {split: _statistics(part) for split, part in values.items()},
        )


def _statistics(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, list(QUANTILES.values())).tolist()
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def imbalance(classes: Mapping[str, Mapping[str, int]]) -> float:
    """Training examples of the largest class for one of the smallest that has any; 1 without classes."""
    counts = [counts["train"] for counts in classes.values() if counts["train"]]
    return max(counts) / min(counts) if counts else 1.0


def _shown_pairs(
    duplicates: Duplicates, splits: Mapping[str, Examined], names: Mapping[str, Table]
) -> Iterator[ShownPair]:
    def located(index: int) -> tuple[str, int]:
        for split, examined in splits.items():
            if index < len(examined):
                return split, index
            index -= len(examined)
        raise IndexError(index)

    for first, second, likeness in zip(
        duplicates.pairs.first[:PAIRS].tolist(),
        duplicates.pairs.second[:PAIRS].tolist(),
        duplicates.likeness[:PAIRS].tolist(),
        strict=True,
    ):
        places = located(first), located(second)
        pictures = [pixels([row])[0] for split, row in places if (pixels := splits[split].pixels)]
        labels = [
            f"{split}: {names[split]['name'][row]}" if split in names else f"{split}, row {row}"
            for split, row in places
        ]
        yield ShownPair((labels[0], labels[1]), (pictures[0], pictures[1]), likeness)


# --- warnings ---------------------------------------------------------------------------------------------------------


def _leaks(report: Report) -> Iterator[str]:
    """Examples of one split that another has, too."""
    noun = report.description.noun
    equal, near = ("equal to", "equal to"), ("a near-duplicate of", "near-duplicates of")
    for counts, (one, many) in ((report.duplicates.equal, equal), (report.duplicates.near, near)):
        for key, count in counts.items():
            first, _, second = key.partition("/")
            if second and count:
                remedy = f"remove them from {first}, or figures on {second} are too good"
                if counts is report.duplicates.near and count > COMMON * len(report.splits[second]):
                    remedy = CHANCE
                yield f"{_counted(count, second, noun)} {one if count == 1 else many} {first} {noun}; {remedy}"


def _counted(count: int, split: str, noun: str) -> str:
    """`1 test image is`, `24 test images are`."""
    return f"1 {split} {noun.removesuffix('s')} is" if count == 1 else f"{count:,} {split} {noun} are"


def _labels(report: Report) -> Iterator[str]:
    if count := report.duplicates.disagreeing:
        groups = "1 group" if count == 1 else f"{count:,} groups"
        yield f"{groups} of equal {report.description.noun} with different answers; correct or remove them"


def _files(report: Report) -> Iterator[str]:
    if bad := report.meta.get("bad", []):
        files = "1 file" if len(bad) == 1 else f"{len(bad):,} files"
        yield f"{files} can't be read; replace what the page names"
    if unused := {reason: n for reason, n in report.meta.get("unused", {}).items() if reason != "hidden"}:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in unused.items())
        count = sum(unused.values())
        files = "1 file is" if count == 1 else f"{count:,} files are"
        yield f"{files} not used ({reasons}); move or convert what belongs here"


def _balance(report: Report) -> Iterator[str]:
    classes, counted = report.classes, report.description.counted
    for split in report.splits:
        if absent := [name for name, counts in classes.items() if not counts[split]]:
            yield f"{split} has no {counted} of {_listed(absent)}; add some, or these classes are not measured"
    few = [name for name, counts in classes.items() if 0 < counts.get("test", 0) < FEW]
    if few:
        yield f"test has fewer than {FEW} {counted} of {_listed(few)}; figures of these classes are chance"
    if (ratio := imbalance(classes)) >= IMBALANCE:
        sizes = {name: counts["train"] for name, counts in classes.items() if counts["train"]}
        large, small = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        yield (
            f"train has {ratio:.0f} times as many {counted} of {large} ({sizes[large]:,}) as of {small} "
            f"({sizes[small]:,}); judge by F1, and collect more of rare classes"
        )


def _unlike(report: Report) -> Iterator[str]:
    """Features in which another split differs from train."""
    usual = reference(report.description, report.splits)
    for split, examined in report.splits.items():
        if split == "train" or not may_differ(usual, examined):
            continue
        tests = [test for test in compare(usual, examined) if test.is_drift]
        if tests:
            changes = "; ".join(f"{test.feature}: {test.change}" for test in tests[:3])
            features = "1 feature" if len(tests) == 1 else f"{len(tests)} features"
            yield f"{split} differs from train in {features} ({changes}); split at random, or expect less there"


def _repeated(report: Report) -> Iterator[str]:
    noun, size = report.description.noun, len(report.splits["train"])
    remedy = "they count twice, remove them if that is not meant"
    if count := report.duplicates.equal["train"]:
        yield f"{_counted(count, 'train', noun)} equal to another one; {remedy}"
    if count := report.duplicates.near["train"]:
        remedy = CHANCE if count > COMMON * size else remedy
        yield f"{_counted(count, 'train', noun)} near-duplicates of another; {remedy}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
