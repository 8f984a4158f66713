"""What the benchmarks are asked to measure, and the data that they measure on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.configuration.composing import compose
from src.configuration.schema import Config
from src.data import packed

EXPERIMENTS = ("cifar10_resnet", "imdb_lstm", "facades_pix2pix_128")  # as a CPU is given them
# As many as the official sets have: what memory holds and what an epoch's order costs depend on it.
EXAMPLES = {
    "cifar10": {"train": 45_000, "val": 5_000},
    "imdb": {"train": 22_500, "val": 2_500},
    "facades": {"train": 400, "val": 100},
}


@dataclass(frozen=True)
class Setting:
    """What to measure, on which data, and how long.

    Attributes:
        folder: for the data, and for what is written on the way.
        experiments: their names.
        overrides: Hydra's, on each experiment; the profile is `full` where they name none.
        archives: a folder of official archives; without it data of their shapes is generated.
        rounds: how often candidates take turns.
        seconds: how long a candidate's turn in a training benchmark is to take, roughly.
        slow: also what takes many minutes.
    """

    folder: Path
    experiments: tuple[str, ...] = EXPERIMENTS
    overrides: tuple[str, ...] = ()
    archives: Path | None = None
    rounds: int = 5
    seconds: float = 2.0
    slow: bool = False

    def arguments(self, experiment: str) -> list[str]:
        """The overrides that make a stage run this experiment on this data, with its outputs in the folder."""
        profile = [] if any(given.startswith("profile=") for given in self.overrides) else ["profile=full"]
        places = [f'data_folder="{self.folder}"', f'output="{self.folder / experiment}"']
        arguments = [f"experiment={experiment}", *profile, *places, *self.overrides]
        if self.archives is not None:
            name = compose(arguments).data().archive_name
            arguments.append(f'data.archive="{self.archives.resolve() / name}"')
        return arguments

    def compose(self, experiment: str) -> Config:
        """The experiment's configuration; its data need not be there."""
        return compose(self.arguments(experiment))

    def prepare(self, experiment: str) -> Config:
        """The experiment's configuration, with its packed data in place.

        Raises:
            Failure: an archive can't be read.
        """
        config = self.compose(experiment)
        if not (config.processed / "meta.json").is_file():
            archive = config.data.archive
            content = config.data().pack(Path(archive)) if archive else generate(config)
            source = {"origin": "archive" if archive else "generated", "sha256": ""}
            packed.write(content, config.processed, config=config.packing, source=source)
        return config

    @classmethod
    @contextmanager
    def temporary(cls, **how: object) -> Iterator[Setting]:
        """A setting whose folder goes when it is left."""
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            yield cls(Path(folder), **how)  # type: ignore[arg-type]


def generate(config: Config) -> packed.Packed:
    """Random train and val splits of the shapes, sizes and lengths that the official data has."""
    random = np.random.default_rng(0)
    makers = {"cifar10": _images, "imdb": _texts, "facades": _pairs}
    maker = makers[config.data.name]
    made = {split: maker(random, count, config) for split, count in EXAMPLES[config.data.name].items()}
    return packed.Packed(made, _meta(config))


def _images(random: np.random.Generator, count: int, config: Config) -> packed.Arrays:
    images = random.integers(0, 256, (count, 3, 32, 32), np.uint8)
    return {"images": images, "labels": random.integers(0, 10, count)}


def _texts(random: np.random.Generator, count: int, config: Config) -> packed.Arrays:
    # IMDB's reviews: a median of about 200 tokens, a long tail up to 2,500.
    lengths = random.lognormal(np.log(200), 0.65, count).clip(10, 2500).astype(np.int64)
    # Zipf's law: the k-th most frequent word in proportion to 1/k.
    words = len(_vocabulary(config)) ** random.random(int(lengths.sum()))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return {"tokens": words.astype(np.int32), "offsets": offsets, "labels": random.integers(0, 2, count)}


def _pairs(random: np.random.Generator, count: int, config: Config) -> packed.Arrays:
    size = config.plain()["data"]["size"]
    return {side: random.integers(0, 256, (count, 3, size, size), np.uint8) for side in ("input", "target")}


def _vocabulary(config: Config) -> list[str]:
    words = config.plain()["data"]["vocabulary"]
    return [packed.UNKNOWN, packed.PADDING, *(f"word{number}" for number in range(words))]


def _meta(config: Config) -> dict[str, object]:
    """What packing would have noted."""
    if config.data.name == "cifar10":
        classes = [str(number) for number in range(10)]
        return {"kind": "images", "classes": classes, "shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.289] * 3}
    if config.data.name == "imdb":
        return {"kind": "text", "classes": ["neg", "pos"], "vocabulary": _vocabulary(config)}
    return {"kind": "pairs", "shape": [3, *[config.plain()["data"]["size"]] * 2]}
