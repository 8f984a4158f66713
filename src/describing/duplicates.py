"""Equal and nearly equal examples, within and between splits, without comparing all pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from src.describing import Examined
from src.describing.pixels import SIDE, correlations, thumbnails

DISTANCE = 7  # bits of 64 in which the hashes of near-duplicates differ at most
PART = 16  # bits of a hash that are sorted by
LIKENESS = 0.9  # correlation of near-duplicates, at least
KEPT = 2  # candidates of an image whose pictures are compared, those with the nearest hashes
COMPARED = 512  # pairs of pictures that are read at once
FOLLOWING = 16  # hashes that each is compared with in each order: the search stays linear


@dataclass(frozen=True)
class Pairs:
    """Pairs of examples: indices int64 [P] into all splits one after the other, the first below the second."""

    first: np.ndarray
    second: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, chosen: np.ndarray) -> Pairs:
        return Pairs(self.first[chosen], self.second[chosen])


@dataclass(frozen=True)
class Duplicates:
    """Counts by split (`train`: examples with a twin before them) or pair (`train/test`: those of the second).

    `near`: images with a near-duplicate that is not equal, counted alike. `disagreeing`: groups of equal examples with
    several answers. `pairs`: the near-duplicates, those between splits first, and `likeness`, their correlations.
    """

    equal: dict[str, int]
    near: dict[str, int]
    disagreeing: int
    pairs: Pairs
    likeness: np.ndarray


def find(splits: Mapping[str, Examined]) -> Duplicates:
    """The duplicates of all splits, of images also those that are nearly equal.

    Near-duplicates are images whose hashes differ in at most `DISTANCE` bits and whose thumbnails correlate by at least
    `LIKENESS`.
    """
    digests = np.concatenate([examined.digests for examined in splits.values()])
    pairs, likeness = _near(splits, digests)
    owners = np.repeat(np.arange(len(splits)), [len(examined) for examined in splits.values()])
    names = list(splits)
    between = [(a, b) for a in range(len(names)) for b in range(a, len(names))]
    near, equal = {}, {}
    for a, b in between:
        key = names[a] if a == b else f"{names[a]}/{names[b]}"
        here, there = splits[names[a]].digests, splits[names[b]].digests
        equal[key] = len(here) - len(np.unique(here)) if a == b else int(np.isin(there, here).sum())
        near[key] = len(np.unique(pairs.second[(owners[pairs.first] == a) & (owners[pairs.second] == b)]))
    is_within = owners[pairs.first] == owners[pairs.second]
    order = np.lexsort([-likeness, is_within])
    return Duplicates(equal, near, _disagreeing(splits, digests), pairs[order], likeness[order])


def _disagreeing(splits: Mapping[str, Examined], digests: np.ndarray) -> int:
    """The number of groups of equal digests with more than one answer."""
    answers = [examined.answers for examined in splits.values() if examined.answers is not None]
    if len(answers) < len(splits):
        return 0
    joined = np.concatenate(answers)
    order = np.lexsort([joined, digests])
    digests, joined = digests[order], joined[order]
    differs = (digests[1:] == digests[:-1]) & (joined[1:] != joined[:-1])
    return len(np.unique(digests[1:][differs]))


def _near(splits: Mapping[str, Examined], digests: np.ndarray) -> tuple[Pairs, np.ndarray]:
    """Pairs of near-duplicates and their correlations, float32 [P]."""
    hashes = [examined.hashes for examined in splits.values() if examined.hashes is not None]
    if len(hashes) < len(splits):
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64)), np.empty(0, np.float32)
    pairs = candidates(np.concatenate(hashes))
    pairs = pairs[digests[pairs.first] != digests[pairs.second]]
    likeness = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), COMPARED):
        part = slice(start, start + COMPARED)
        likeness[part] = correlations(_thumbnails(splits, pairs.first[part]), _thumbnails(splits, pairs.second[part]))
    is_alike = likeness >= LIKENESS
    return pairs[is_alike], likeness[is_alike]


def _thumbnails(splits: Mapping[str, Examined], indices: np.ndarray) -> np.ndarray:
    """The thumbnails of examples of all splits, float32 [n, ...]."""
    small = np.empty((len(indices), SIDE, SIDE, 3), np.float32)
    start = 0
    for examined in splits.values():
        places = np.flatnonzero((indices >= start) & (indices < start + len(examined)))
        if len(places) and examined.pixels:
            small[places] = thumbnails(examined.pixels((indices[places] - start).tolist()))
        start += len(examined)
    return small


def candidates(hashes: np.ndarray) -> Pairs:
    """Pairs of hashes, uint64 [N], that differ in at most `DISTANCE` bits.

    After multi-index hashing (Norouzi et al., 2012): of four parts of two such hashes one differs in one bit at most.
    So for each part without one of its bits the hashes are sorted by it, and each is compared with the `FOLLOWING`
    next: all pairs are found unless more than that are equal in a part. Of each second the `KEPT` nearest are given.
    """
    count = np.uint64(len(hashes))
    codes = np.empty(0, np.uint64)  # pairs as one number: first * count + second
    for low in range(0, 64, PART):
        turned = (hashes << np.uint64(low)) | (hashes >> np.uint64((64 - low) % 64)) if low else hashes
        numbers = [codes]
        for bit in range(64 - PART, 64):  # of the part, which stands in the highest bits
            order = np.argsort(turned & ~np.uint64(1 << bit), kind="stable")
            ordered, order = turned[order], order.astype(np.uint64)
            for step in range(1, min(FOLLOWING, len(ordered) - 1) + 1):
                near = np.flatnonzero(np.bitwise_count(ordered[step:] ^ ordered[:-step]) <= DISTANCE)
                first, second = order[near], order[near + step]
                numbers.append(np.minimum(first, second) * count + np.maximum(first, second))
        joined = np.sort(np.concatenate(numbers))  # several times as fast as np.unique (numpy 2.5), which hashes
        codes = joined[np.append(True, joined[1:] != joined[:-1])[: len(joined)]]
    pairs = Pairs(
        (codes // max(count, np.uint64(1))).astype(np.int64), (codes % max(count, np.uint64(1))).astype(np.int64)
    )
    return pairs[_nearest(pairs.second, np.bitwise_count(hashes[pairs.first] ^ hashes[pairs.second]))]


def _nearest(owners: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The places of the `KEPT` least distances of each owner, in their order."""
    order = np.lexsort([distances, owners])
    starts = np.searchsorted(owners[order], owners[order], "left")
    return np.sort(order[np.arange(len(order)) - starts < KEPT])
