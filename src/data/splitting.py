"""Assigns examples to train, val and test: as their source says, the rest by a rule that is drawn once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF
from src.data.packed import stratified_holdout


def assign_splits(
    labels: Sequence[Hashable],
    *,
    splits: Sequence[str | None] | None,
    groups: Sequence[Hashable] | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> list[str]:
    """The split of each example: "train", "val" or "test".

    A split that `splits` names is kept; one that it names nowhere is drawn, class by class: first test, of all examples
    that are not val's, then val, of those that are left. Without groups a class of at least two examples gives at
    least one and keeps at least one.

    Args:
        labels: the class of each example; the same value for all if there are none.
        splits: names as in `SPLIT_OF`, in any case; None or "" for an example without a split, which is train's as far
            as it is not drawn. None: no example has a split.
        groups: examples of one group, e.g. photos of one person, come into the same split; an example whose group has a
            split elsewhere joins it. Groups are drawn so that the classes' shares come as near to the fractions as
            the sizes of the groups allow. None: each example by itself.

    Raises:
        SourceError: a name is no split's, a group has two splits, or there are too few groups to draw from.
    """
    source_splits = [""] * len(labels) if splits is None else [_in_row(row, name) for row, name in enumerate(splits)]
    result = np.array(source_splits if groups is None else _joined(source_splits, groups), "<U5")
    names = sorted(set(labels), key=lambda label: (str(type(label)), label))
    codes = {label: code for code, label in enumerate(names)}
    classes = np.array([codes[label] for label in labels], np.int64)
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if (result == split).any():
            continue
        pool = np.flatnonzero((result == "train") | (result == ""))
        if not pool.size:
            raise SourceError(f"no example is left of which {split} could be drawn: give train some")
        if groups is None:
            _, held = stratified_holdout(classes[pool], fraction, seed)
        else:
            held = _group_holdout(classes[pool], [groups[i] for i in pool.tolist()], fraction, seed)
        result[pool[held]] = split
    result[result == ""] = "train"
    return [str(name) for name in result]


def split_name(name: str | None) -> str:
    """The split that a name stands for; "" for none.

    Raises:
        SourceError: it is the name of no split.
    """
    key = str(name or "").strip().lower()
    if key and key not in SPLIT_OF:
        raise SourceError(f"{name!r} is no split: write one of {', '.join(SPLIT_OF)}, or nothing")
    return SPLIT_OF.get(key, "")


def _in_row(row: int, name: str | None) -> str:
    try:
        return split_name(name)
    except SourceError as error:
        raise SourceError(f"row {row + 1}: {error}") from None


def _joined(splits: Sequence[str], groups: Sequence[Hashable]) -> list[str]:
    """Gives the examples without a split that of their group."""
    of_group: dict[Hashable, str] = {}
    for split, group in zip(splits, groups, strict=True):
        if split and of_group.setdefault(group, split) != split:
            raise SourceError(
                f"group {group!r} has examples in {of_group[group]} and in {split}: give all of a group the same split"
            )
    return [of_group.get(group, "") for group in groups]


def _group_holdout(classes: np.ndarray, groups: Sequence[Hashable], fraction: float, seed: int) -> np.ndarray:
    """The indices of the examples of some groups, about `fraction` of each class.

    Takes groups in random order, each that brings the numbers of the classes nearer to those wanted and leaves an
    example of every class.
    """
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    members = list(rows.values())
    if len(members) < 2:
        raise SourceError(f"all examples to draw from are of the group {next(iter(rows), None)!r}: give at least two")
    left = Counter(classes.tolist())
    missing = {label: fraction * count for label, count in left.items()}
    held: list[int] = []
    smallest: list[int] | None = None  # of the groups without which every class still has an example
    for i in np.random.default_rng(seed).permutation(len(members)):
        counts = Counter(classes[members[i]].tolist())
        if any(left[label] <= count for label, count in counts.items()):
            continue
        smallest = members[i] if smallest is None or len(members[i]) < len(smallest) else smallest
        if sum(abs(missing[label]) - abs(missing[label] - count) for label, count in counts.items()) > 0:
            held += members[i]
            missing = {label: count - counts[label] for label, count in missing.items()}
            left -= counts
    if smallest is None:
        raise SourceError("each group has the only examples of a class: no group can be held out")
    return np.sort(np.array(held or smallest))
