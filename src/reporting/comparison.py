"""Runs side by side: which belong together, what differs between them, and whether it made a difference.

Read from the files that the stages write, which are the truth; MLflow shows the same runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from src.common.errors import ConfigError
from src.common.identity import flattened
from src.common.yaml_files import read_yaml
from src.configuration.declarations import load_task, task_of
from src.configuration.metrics import Direction, Metric, metric_logged_as
from src.configuration.schema import RECORD_KEYS
from src.reporting.significance import PairedTest, Summary, paired_tests, summarize
from src.reporting.tables import read_csv

# What tells a run from its repetitions, or does not touch its result.
LEFT_OUT = {
    "defaults",
    "hydra",
    "name",
    "description",
    "profile",
    "seed",
    *RECORD_KEYS,
    "archive_folder",
    "data_folder",
    "evaluation",
    "export",
}
LEFT_OUT_BELOW = {
    "data": {"name", "official", "archive", "sha256", "ray"},
    "trainer": {"log_every", "checkpoint_seconds", "profiler", "limit_test_batches", "monitor"},
}


@dataclass(frozen=True)
class Run:
    """A run that came to its end, as its folder tells."""

    folder: Path
    experiment: str
    profile: str
    seed: int
    monitor: str
    table: Mapping[str, Metric]  # the metrics of its task; empty if the model is no longer there
    settings: Mapping[str, Any]  # dotted key -> value, of what may touch the result
    metrics: Mapping[str, float]  # train_..., val_... of the kept epoch; test_..., if it was evaluated
    history: Sequence[Mapping[str, float]]  # a row for each epoch
    time: float  # when it ended, seconds since 1970

    def direction(self, metric: str) -> Direction | None:
        """Which values of the metric are better, as its task says; None: neither more nor less is."""
        declared = metric_logged_as(metric, self.table)
        return declared.better if declared else None


@dataclass(frozen=True)
class Variant:
    """Runs of one configuration under several seeds, one each."""

    number: int
    runs: tuple[Run, ...]
    dvc: bool  # whether the result that DVC keeps is one of them

    @cached_property
    def by_seed(self) -> dict[int, Run]:
        """Seed -> run."""
        return {run.seed: run for run in self.runs}

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its runs share."""
        return self.runs[0].settings

    def summary(self, metric: str) -> Summary | None:
        """The metric over the seeds; None if no run has it."""
        return summarize([run.metrics[metric] for run in self.runs if metric in run.metrics])


@dataclass(frozen=True)
class Group:
    """All variants of an experiment on one profile; the first is what the others are compared with."""

    experiment: str
    profile: str
    variants: tuple[Variant, ...]

    @property
    def monitor(self) -> str:
        """The metric that training looked at."""
        return self.variants[0].runs[0].monitor

    @property
    def metrics(self) -> list[str]:
        """All metrics of its runs, what training looked at first, then the same of the test split."""
        names = dict.fromkeys(name for variant in self.variants for run in variant.runs for name in run.metrics)
        first = {name: place for place, name in enumerate(self.headline)}
        return sorted(names, key=lambda name: (first.get(name, len(first)), not name.startswith("test_"), name))

    @property
    def headline(self) -> list[str]:
        """What a reader looks at first: see `headline_of`."""
        return headline_of([run for variant in self.variants for run in variant.runs])

    @property
    def differing(self) -> list[str]:
        """The keys of the configuration in which the variants differ."""
        keys = dict.fromkeys(key for variant in self.variants for key in variant.settings)
        return [key for key in keys if len({_text(v.settings.get(key)) for v in self.variants}) > 1]

    def direction(self, metric: str) -> Direction | None:
        """Which values of the metric are better, as its task says; None: neither more nor less is."""
        return self.variants[0].runs[0].direction(metric)

    def tests(self, metric: str) -> dict[int, PairedTest]:
        """Each further variant against the first, by the variant's number.

        A difference in a metric of which neither more nor less is better has the verdict "different".
        """
        first, *others = self.variants
        direction = self.direction(metric)
        tests = paired_tests(
            {
                variant.number: [
                    variant.by_seed[seed].metrics[metric] - run.metrics[metric]
                    for seed, run in first.by_seed.items()
                    if seed in variant.by_seed
                    if metric in run.metrics and metric in variant.by_seed[seed].metrics
                ]
                for variant in others
            },
            less_is_better=direction == "min",
        )
        if direction:
            return tests
        return {
            number: replace(test, verdict="different") if test.verdict in ("better", "worse") else test
            for number, test in tests.items()
        }


def headline_of(runs: Sequence[Run]) -> list[str]:
    """The monitor of runs of one experiment and, on the test split, the same metric or else the first of the task."""
    monitor = runs[0].monitor
    logged = {name for run in runs for name in run.metrics}
    names = [f"test_{name}" for name in (monitor.partition("_")[2], *runs[0].table)]
    return [monitor, *[name for name in names if name in logged][:1]]


def read_runs(folders: Sequence[Path]) -> Iterator[Run]:
    """The complete runs in the folders and below them."""
    for folder in folders:
        for path in sorted(folder.rglob("config.yaml")):
            if run := read_run(path.parent):
                yield run


def read_run(folder: Path) -> Run | None:
    """A folder's run; None if there is none, or none that came to its end."""
    try:
        config = read_yaml(folder / "config.yaml")
        trained = json.loads((folder / "train" / "metrics.json").read_text())
        time = (folder / "train" / "metrics.json").stat().st_mtime
        history = read_csv(folder / "train" / "history.csv")
        evaluated = folder / "metrics.json"
        on_test = json.loads(evaluated.read_text()) if evaluated.is_file() else {}
        metrics = {key: value for key, value in trained.items() if key != "epoch"}
        metrics |= {f"test_{key}": value for key, value in on_test.items() if key != "examples"}
        return Run(
            folder=folder,
            experiment=config["name"],
            profile=config["profile"]["name"],
            seed=config["seed"],
            monitor=config["trainer"]["monitor"],
            table=_metrics_of(config["model"]),
            settings=dict(_settings(config)),
            metrics={key: float(value) for key, value in metrics.items() if _is_number(value)},
            history=history,
            time=time,
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


def grouped(runs: Sequence[Run], dvc: Path) -> list[Group]:
    """The runs by experiment and profile, then by configuration.

    Of a configuration's runs of one seed the newest counts: the same computation twice is no second observation. `dvc`:
    the folder below which DVC keeps its results. The variant that DVC keeps is the first, then those with more seeds.
    """
    parts: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        part = parts.setdefault((run.experiment, run.profile), {})
        part.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    groups = []
    for (experiment, profile), part in sorted(parts.items()):
        variants = []
        for repetitions in part.values():
            newest = {run.seed: run for run in sorted(repetitions, key=lambda run: run.time)}
            kept = any(run.folder == dvc / run.experiment for run in repetitions)
            variants.append((not kept, -len(newest), min(run.time for run in repetitions), tuple(newest.values())))
        ordered = sorted(variants, key=lambda variant: variant[:3])
        numbered = tuple(
            Variant(number, tuple(sorted(variant[3], key=lambda run: run.seed)), not variant[0])
            for number, variant in enumerate(ordered, 1)
        )
        groups.append(Group(experiment, profile, numbered))
    return groups


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in config.items():
        if section in LEFT_OUT:
            continue
        if isinstance(values, Mapping):
            below = LEFT_OUT_BELOW.get(section, set())
            values = {key: value for key, value in values.items() if key not in below}
        yield from flattened({section: values})


def _metrics_of(model: Any) -> Mapping[str, Metric]:
    try:
        metrics: Mapping[str, Metric] = load_task(task_of(model)).metrics
    except ConfigError:
        return {}
    return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return json.dumps(value, default=str)
