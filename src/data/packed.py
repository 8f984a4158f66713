"""Packed splits: a data set as three safetensors files, a `meta.json` and an `origin.json`. (Written by writing.py.)

A model depends on the first four; `origin.json` says which archive they were packed from, and how, so that the same
archive under another name retrains nothing. DVC hashes one file a split instead of 60,000, and loading is a memory
map. Which arrays a split has depends on its kind: see src/data/kinds/.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.common.errors import Failure
from src.data.verifying import noted_sha256

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "val", "test")
UNKNOWN, PADDING = "<unk>", "<pad>"  # the first two tokens of every vocabulary
DIGEST_BYTES = 16  # of an example, by which equal ones are found
ORIGIN = {"config", "source"}  # what every origin.json holds
Arrays = dict[str, np.ndarray]
Split = dict[str, Any]  # arrays, or what stands for them until they are written (image_rows.Streamed)


@dataclass(frozen=True)
class Packed:
    """What a data set's `pack` returns: each split's arrays, and its meta: the kind, classes, mean, vocabulary, ...

    An array may be one that is made while it is written.
    """

    splits: Mapping[str, Split]
    meta: dict[str, Any]
    unused: Mapping[str, int] = field(default_factory=dict)  # files of the archive without use, by reason
    bad: list[tuple[str, str]] = field(default_factory=list)  # examples that are left out, each with its fault
    # Columns that describe the examples of a split, in the order of its rows: `name` is a file's path in the archive.
    facts: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    without: Callable[[frozenset[str]], Packed] | None = None  # packs without these files; None: none may be skipped


class PackedError(Failure):
    """A packed split is missing, damaged, or another than was asked for."""


def read_meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` and `origin.json` of a packed data set, as one mapping.

    Raises:
        PackedError: one is missing, or is not what `write` writes.
    """
    meta, origin = _read_content(folder), _read_json(folder / "origin.json")
    if not origin.keys() >= ORIGIN:
        raise _damaged(folder / "origin.json", ValueError("something is missing in it"))
    return meta | origin


def _read_content(folder: Path) -> dict[str, Any]:
    """The `meta.json` alone."""
    meta = _read_json(folder / "meta.json")
    try:
        if not all(isinstance(facts["sha256"], str) for facts in meta["splits"].values()):
            raise ValueError("a split has no sha256")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(folder / "meta.json", error) from None
    return meta


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise PackedError(f"{path} is missing: run `dvc repro` to prepare the data") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _damaged(path, TypeError("not a mapping"))
    return content


def _damaged(path: Path, error: Exception) -> PackedError:
    return PackedError(f"{path} is damaged ({error}): delete it and run `dvc repro`")


def read_split(folder: Path, split: str) -> dict[str, Tensor]:
    """The tensors of one split, memory-mapped, after a check of the file's sha256 against `meta.json`.

    A process checks a file once, as long as nothing writes to it; of a large file all processes do so together. The
    tensors are shared: do not write into them.

    Raises:
        PackedError: the file is missing or its bytes changed since it was packed.
    """
    path = folder / f"{split}.safetensors"
    expected = _read_content(folder)["splits"].get(split, {}).get("sha256")
    if not (path.is_file() and expected):
        raise PackedError(f"{path} is missing: run `dvc repro` (or `dvc pull`) to prepare the data")
    facts = path.stat()
    return dict(_read(path, expected, facts.st_ino, facts.st_mtime_ns, facts.st_size))


@functools.lru_cache(maxsize=len(SPLITS))
def _read(path: Path, expected: str, *facts: int) -> dict[str, Tensor]:
    """Checks and maps a file; `facts` change with it."""
    from safetensors import SafetensorError, safe_open

    digest = noted_sha256(path)
    try:
        if digest != expected:
            raise SafetensorError(f"sha256 {digest[:12]}…, {expected[:12]}… was packed")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise PackedError(
            f"{path} is damaged ({error}): delete {path.parent} and run `dvc repro`, or the `python -m src.train` again"
        ) from None


def stratified_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `fraction` of each class at random; returns the sorted indices that stay and those that are held out.

    Each class with at least two examples gives at least one and keeps at least one.
    """
    random = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def duplicates(splits: Mapping[str, Sequence[bytes]]) -> dict[str, int]:
    """Counts equal examples: within each split, and those of one split that stand in another.

    `splits` gives each split's examples as bytes. The keys read `train` (beyond the first of each) or `train/test`
    (examples of the second that the first has).
    """
    return equal_digests(
        {
            split: [hashlib.blake2b(e, digest_size=DIGEST_BYTES).digest() for e in items]
            for split, items in splits.items()
        }
    )


def equal_digests(splits: Mapping[str, Sequence[bytes] | np.ndarray]) -> dict[str, int]:
    """What `duplicates` counts, of the examples' digests of `DIGEST_BYTES`."""
    digests = {split: np.asarray(items, f"S{DIGEST_BYTES}") for split, items in splits.items()}
    unique = {split: np.unique(items) for split, items in digests.items()}
    report = {split: len(items) - len(unique[split]) for split, items in digests.items()}
    for first, second in combinations(splits, 2):
        report[f"{first}/{second}"] = int(np.isin(digests[second], unique[first]).sum())
    return report


def mean_and_std(counts: np.ndarray) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel in 0..1, of how often each value occurs: integers [C, 256].

    Counting values is exact in integers, and 20 times as fast as a float mean over all pixels.
    """
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt(counts @ values**2 / counts.sum(1) - mean**2)
    return {"mean": [round(float(m), 6) for m in mean], "std": [round(float(max(s, 1e-3)), 6) for s in std]}


def pack_images(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray] | None,
    test: tuple[np.ndarray, np.ndarray],
    *,
    classes: Sequence[str],
    val_fraction: float,
    split_seed: int,
) -> Packed:
    """Packs labelled images (uint8 [N, C, H, W], integer [N]); without `val` it is drawn from `train`, class by class.

    The meta gives the channels' mean and standard deviation over the training part, in 0..1.
    """
    if val is None:
        keep, held = stratified_holdout(train[1], val_fraction, split_seed)
        train, val = (train[0][keep], train[1][keep]), (train[0][held], train[1][held])
    parts = dict(zip(SPLITS, (train, val, test), strict=True))
    counts = np.stack([np.bincount(train[0][:, c].ravel(), minlength=256) for c in range(train[0].shape[1])])
    meta = {
        "kind": "images",
        "classes": list(classes),
        "shape": list(train[0].shape[1:]),
        **mean_and_std(counts),
        "duplicates": duplicates({name: [image.tobytes() for image in images] for name, (images, _) in parts.items()}),
    }
    return Packed({k: {"images": x, "labels": y.astype(np.int64)} for k, (x, y) in parts.items()}, meta)
