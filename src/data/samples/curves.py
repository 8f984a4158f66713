"""The embedded sample of a table: sine waves of random height and phase, read at 100 places, a wave a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from src.data.samples.archive import write_archive

COLUMNS = 100
COUNTS = {"train": 2000, "test": 400}


def draw(archive: Path) -> None:
    """Writes train.csv and test.csv."""
    random = np.random.default_rng(0)
    write_archive(archive, [(f"curves/{split}.csv", _csv(waves(count, random))) for split, count in COUNTS.items()])


def waves(count: int, random: np.random.Generator) -> np.ndarray:
    """float64 [count, COLUMNS]: one to two periods, heights of 0.5 to 1.5, any phase, little noise."""
    at = np.arange(COLUMNS) / COLUMNS
    height, periods, phase = random.uniform((0.5, 1, 0), (1.5, 2, 1), (count, 3)).T[:, :, None]
    noise = 0.02 * random.standard_normal((count, COLUMNS))
    return height * np.sin(2 * np.pi * (periods * at + phase)) + noise


def _csv(rows: np.ndarray) -> bytes:
    header = ",".join(f"t{number}" for number in range(COLUMNS))
    return "\n".join([header, *(",".join(f"{value:.4f}" for value in row) for row in rows)]).encode() + b"\n"
