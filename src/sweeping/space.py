"""The search space: the schema of the section `sweep`, and trial configurations from Optuna's suggestions."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pydantic
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from src.common.errors import ConfigError
from src.common.hardware import cores
from src.common.paths import CONF
from src.configuration.composing import check, compose_unchecked
from src.configuration.declarations import monitor_direction
from src.configuration.schema import Config, NonNegativeInt, Positive, PositiveInt, Section, plain

if TYPE_CHECKING:
    from optuna.trial import Trial

# Objectives that are measured after training; all others are metrics of the validation.
PARAMETERS, LATENCY = "parameters", "latency_ms"
# Prefixes of storages that several processes share.
POSTGRESQL, JOURNAL = "postgresql://", "journal:"

Bounds = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
IntBounds = Annotated[list[int], Field(min_length=2, max_length=2)]
Scalar = str | int | float | bool | None


class Parameter(Section):
    """The range of one key of the configuration: exactly one of `float`, `int` and `choice`.

        {float: [0.03, 0.4], log: true}          a number between two bounds, both included
        {int: [32, 96], step: 16}
        {choice: [max, mean]}                    values; also of a group: {choice: [fast_resnet, resnet18]}
        {choice: {muon: {name: muon, ...}, ...}} sections, by a label
        {..., when: {model.optimizer: muon}}     only if an earlier parameter has this value, or one of a list

    A key may have several ranges under several conditions: `KEY@TEXT` tells them apart.
    """

    model_config = pydantic.ConfigDict(populate_by_name=True)

    real: Bounds | None = Field(None, alias="float")
    integer: IntBounds | None = Field(None, alias="int")
    choice: Annotated[list[Scalar], Field(min_length=1)] | Annotated[dict[str, Any], Field(min_length=1)] | None = None
    log: bool = False
    step: Positive | None = None
    when: dict[str, Scalar | list[Scalar]] = Field({})

    @pydantic.model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if sum(kind is not None for kind in (self.real, self.integer, self.choice)) != 1:
            raise ValueError("give exactly one of float, int and choice")
        if self.choice is not None and (self.log or self.step):
            raise ValueError("log and step are for float and int")
        if self.log and self.step:
            raise ValueError("log and step exclude each other")
        low, high = self.real or self.integer or (0, 0)
        if low > high:
            raise ValueError(f"the lower bound {low:g} is above the upper one {high:g}")
        if self.log and low <= 0:
            raise ValueError(f"a logarithmic range starts above zero, not at {low:g}")
        if self.integer and self.step and self.step != int(self.step):
            raise ValueError("the step of an int is whole")
        return self

    @property
    def labels(self) -> list[Scalar]:
        """The values, or labels, of a `choice` that Optuna chooses among."""
        return list(self.choice or ())

    def suggest(self, trial: Trial, name: str) -> Scalar:
        """Optuna's suggestion: a number, or a choice's label."""
        if self.real:
            return trial.suggest_float(name, *self.real, step=self.step, log=self.log)
        if self.integer:
            return trial.suggest_int(name, *self.integer, step=int(self.step or 1), log=self.log)
        return trial.suggest_categorical(name, self.labels)

    def value(self, suggested: Any) -> Any:
        """The value in the configuration for a suggestion: of a labelled choice its section."""
        return self.choice[suggested] if isinstance(self.choice, dict) else suggested

    def grid(self) -> list[Scalar] | None:
        """All values; None if there are infinitely many, or the scale is logarithmic."""
        if self.choice is not None:
            return self.labels
        if self.integer:
            return None if self.log else list(range(self.integer[0], self.integer[1] + 1, int(self.step or 1)))
        if self.real and self.step:
            low, high = self.real
            return [low + i * self.step for i in range(int((high - low) / self.step + 1e-9) + 1)]
        return None

    def edges(self) -> list[Any]:
        """The suggestions to check against the schema before a sweep starts: both bounds, or every choice."""
        return self.labels or list(dict.fromkeys(self.real or self.integer or ()))

    def applies(self, suggestions: Mapping[str, Any]) -> bool:
        """Whether the conditions hold for the suggestions of earlier parameters."""
        return all(key in suggestions and suggestions[key] in as_list(value) for key, value in self.when.items())


class Ray(Section):
    """Sweep processes on a Ray cluster, at the address in RAY_ADDRESS."""

    processes: PositiveInt
    cpus: PositiveInt = 1  # of each process; its threads are trainer.threads
    gpus: NonNegativeInt = 0  # of each process


class Sweep(Section):
    """What is searched, how, and for how long. A file per experiment: conf/sweep/."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = Field(
        None, description="name of the study and of its folder in experiments/sweeps; null: EXPERIMENT-PROFILE"
    )
    space: Annotated[dict[str, Parameter], Field(min_length=1, description="range by key of the configuration")]
    objectives: dict[str, Literal["max", "min"]] = Field(
        {}, description="direction by metric; {}: trainer.monitor; several: a Pareto front"
    )
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes"] = Field("tpe", description="Optuna's sampler")
    pruner: Literal["median", "none"] = Field(
        "median", description="ends a trial whose validation is below the median of earlier trials at that epoch"
    )
    trials: PositiveInt | None = Field(20, description="number of finished trials, failed and pruned ones included")
    minutes: Positive | None = Field(
        None, description="no trial starts after this many minutes, of all sessions and processes together"
    )
    workers: PositiveInt = Field(
        1, description="worker processes; with more than one, suggestions depend on which trial ends first"
    )
    retries: NonNegativeInt = Field(2, description="how often a trial is trained again after its process died")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="seed of the suggestions; that of the trainings is the configuration's `seed`"
    )
    storage: str | None = Field(
        None, description="null: SQLite in the study's folder; postgresql://USER@HOST/DATABASE or journal:PATH: shared"
    )
    ray: Ray | None = Field(None, description="starts several sweep processes on a Ray cluster; needs a shared storage")

    @pydantic.field_validator("storage")
    @classmethod
    def _check_prefix(cls, storage: str | None) -> str | None:
        if storage is not None and not re.match(f"({POSTGRESQL}|{JOURNAL}).", storage):
            raise ValueError("is none of null, postgresql://USER@HOST/DATABASE, journal:PATH")
        return storage


class SweepConfig(Config):
    """The configuration of an experiment, with the section `sweep`."""

    sweep: Sweep

    @property
    def study(self) -> str:
        """The study's name."""
        return self.sweep.study or f"{self.name}-{self.profile.name}"

    @property
    def objectives(self) -> dict[str, Literal["max", "min"]]:
        """The direction of each objective, by metric."""
        return self.sweep.objectives or {self.trainer.monitor: monitor_direction(self)}

    @property
    def search(self) -> dict[str, Any]:
        """The keys of `sweep` that may not change while the study exists."""
        return {key: value for key, value in plain(self.sweep).items() if key in ("space", "sampler", "pruner", "seed")}

    @property
    def threads_per_trial(self) -> int | None:
        """`trainer.threads` of a trial: with several workers a share of the cores, unless set; None: torch's choice."""
        if self.trainer.threads is None and self.sweep.workers > 1:
            return max(1, cores() // (self.sweep.workers * self.trainer.devices))
        return self.trainer.threads

    def plain(self) -> dict[str, Any]:
        """The configuration without the section `sweep`, as plain values."""
        return {key: value for key, value in super().plain().items() if key != "sweep"}


def suggest(space: Mapping[str, Parameter], trial: Trial) -> dict[str, Scalar]:
    """Optuna's suggestions for one trial, by parameter, in the order of the space."""
    suggestions: dict[str, Scalar] = {}
    for name, parameter in space.items():
        if parameter.applies(suggestions):
            suggestions[name] = parameter.suggest(trial, name)
    return suggestions


def assignments(space: Mapping[str, Parameter], suggestions: Mapping[str, Any]) -> dict[str, Any]:
    """The suggestions as values by dotted key of the configuration."""
    return {name.partition("@")[0]: space[name].value(suggestions[name]) for name in space if name in suggestions}


def trial_config(
    space: Mapping[str, Parameter], suggestions: Mapping[str, Any], overrides: Sequence[str], output: str = "."
) -> Config:
    """The configuration of a trial: Hydra's `overrides`, then the suggestions.

    Equal to composing with all of them as overrides, in a tenth of the time: only the overrides and the choices of
    groups are composed, and that once.

    Raises:
        ConfigError: with one line per fault.
    """
    values = assignments(space, suggestions)
    groups = [f"{key}={value}" for key, value in values.items() if _is_group(key)]
    content = copy.deepcopy(_compose((*overrides, *groups)))
    for key, value in values.items():
        if not _is_group(key):
            OmegaConf.update(content, key, value, merge=False, force_add=True)
    content.output = output
    return check(content)


@functools.lru_cache(maxsize=32)
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    return compose_unchecked([*overrides, "output=."])


def _is_group(key: str) -> bool:
    return (CONF / key).is_dir()


def grid(space: Mapping[str, Parameter]) -> dict[str, list[Scalar]]:
    """All values of each parameter.

    Raises:
        ConfigError: a parameter has no countable values, or a condition.
    """
    values = {}
    for name, parameter in space.items():
        points = parameter.grid()
        if points is None:
            raise ConfigError(f"sweep.space.{name}: a grid needs steps; give it a step, or use another sweep.sampler")
        if parameter.when:
            raise ConfigError(f"sweep.space.{name}.when: a grid has no conditions; use another sweep.sampler")
        values[name] = points
    return values


def as_list(value: Any) -> list[Any]:
    """A condition's list of values; of a single value a list."""
    return value if isinstance(value, list) else [value]


def count_points(values: Mapping[str, list[Scalar]]) -> int:
    """The number of points of a grid."""
    return math.prod(map(len, values.values()))


def nested(assignments: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings, for params.yaml; a key below a group's choice keeps its dots."""
    tree: dict[str, Any] = {}
    for key, value in assignments.items():
        *sections, last = key.split(".")
        section: Any = tree
        for name in sections:
            section = section.setdefault(name, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = dict(value) if isinstance(value, Mapping) else value
        else:
            tree[key] = value
    return tree
