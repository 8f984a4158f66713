"""What to measure, and generated data to measure it on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.common.errors import Failure
from src.configuration.composing import compose
from src.configuration.schema import Config
from src.data import packed
from src.data.writing import write_packed

EXPERIMENTS = ("cifar10_resnet", "imdb_lstm", "facades_pix2pix_128")
# The files of the official archives.
ARCHIVES = {
    "cifar10": "cifar-10-binary.tar.gz",
    "imdb": "aclImdb*.tar.gz",
    "facades": "facades.tar.gz",
    "horse2zebra": "horse2zebra.zip",
}
# The sizes of the official sets: memory and the cost of an epoch's order depend on them.
EXAMPLES = {
    "cifar10": {"train": 45_000, "val": 5_000},
    "imdb": {"train": 22_500, "val": 2_500},
    "facades": {"train": 400, "val": 100},
    "horse2zebra": {"train": 1067, "val": 53},
}


@dataclass(frozen=True)
class Setting:
    """What to measure, and for how long.

    Attributes:
        folder: for the data and for temporary files.
        experiments: their names.
        overrides: Hydra's, for every experiment; without a `profile=` among them the profile is `full`.
        rounds: turns of each candidate.
        seconds: approximate length of a turn in a training benchmark.
        slow: also the figures that take many minutes.
        archives: a folder with the official archives, for what is measured on real data; None: the sample data.
        record: files of public record code, to be run beside this project's on the same GPU.
    """

    folder: Path
    experiments: tuple[str, ...] = EXPERIMENTS
    overrides: tuple[str, ...] = ()
    rounds: int = 5
    seconds: float = 2.0
    slow: bool = False
    archives: Path | None = None
    record: tuple[Path, ...] = ()

    def arguments(self, experiment: str) -> list[str]:
        """The overrides with which a stage runs this experiment on the generated data and writes into the folder."""
        profile = [] if any(word.startswith("profile=") for word in self.overrides) else ["profile=full"]
        paths = [f'data_folder="{self.folder}"', f'output="{self.folder / experiment}"']
        return [f"experiment={experiment}", *profile, *paths, *self.overrides]

    def compose(self, experiment: str) -> Config:
        """The experiment's configuration; its data may be missing."""
        return compose(self.arguments(experiment))

    def real(self, experiment: str, *overrides: str) -> Config:
        """The experiment's configuration on real data: the official archive, or the sample.

        Raises:
            Failure: `archives` has no archive of this data set.
        """
        words = [f"experiment={experiment}", f'output="{self.folder / experiment}"', *self.overrides, *overrides]
        config = compose(words)
        if self.archives is None:
            return config
        archives = sorted(self.archives.glob(pattern := ARCHIVES[config.data.name]))
        if not archives:
            raise Failure(f"--archives {self.archives}: no {pattern} in it; add it, or leave --archives for the sample")
        return compose([*words, "profile=full", f'data.archive="{archives[0]}"'])

    def prepare(self, experiment: str) -> Config:
        """The experiment's configuration, with generated packed data in place."""
        config = self.compose(experiment)
        if not (config.processed / "meta.json").is_file():
            source = {"origin": "generated", "sha256": ""}
            write_packed(generate(config), config.processed, config=config.packing, source=source)
        return config

    @classmethod
    @contextmanager
    def temporary(cls, **options: object) -> Iterator[Setting]:
        """A setting with a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            yield cls(Path(folder), **options)  # type: ignore[arg-type]


def generate(config: Config) -> packed.Packed:
    """Random train and val splits with the shapes, sizes and lengths of the official data."""
    random = np.random.default_rng(0)
    generate_split = {"cifar10": _images, "imdb": _texts, "facades": _pairs, "horse2zebra": _domains}[config.data.name]
    splits = {split: generate_split(random, count, config) for split, count in EXAMPLES[config.data.name].items()}
    return packed.Packed(splits, _meta(config))


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


def _domains(random: np.random.Generator, count: int, config: Config) -> packed.Arrays:
    data = config.plain()["data"]
    side = round(data["size"] * data["enlarge"])
    lengths = {"a": count, "b": 5 * count // 4}
    return {name: random.integers(0, 256, (length, 3, side, side), np.uint8) for name, length in lengths.items()}


def _vocabulary(config: Config) -> list[str]:
    words = config.plain()["data"]["vocabulary"]
    return [packed.UNKNOWN, packed.PADDING, *(f"word{number}" for number in range(words))]


def _meta(config: Config) -> dict[str, object]:
    """The content of meta.json."""
    if config.data.name == "cifar10":
        classes = [str(number) for number in range(10)]
        return {"kind": "images", "classes": classes, "shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.289] * 3}
    if config.data.name == "imdb":
        return {"kind": "text", "classes": ["neg", "pos"], "vocabulary": _vocabulary(config)}
    kind = "unpaired" if config.data.name == "horse2zebra" else "pairs"
    return {"kind": kind, "shape": [3, *[config.plain()["data"]["size"]] * 2]}
