"""What a sweep searches: the schema of its section, and the way from Optuna's suggestions to Hydra's overrides."""

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
from src.common.paths import CONF
from src.configuration.composing import check, compose_unchecked
from src.configuration.declarations import monitor_direction
from src.configuration.schema import Config, NonNegativeInt, Positive, PositiveInt, Section, plain

if TYPE_CHECKING:
    from optuna.trial import Trial

# Objectives that are measured after training, beside the validation's metrics.
PARAMETERS, LATENCY = "parameters", "latency_ms"
# How the addresses of storages that several processes share begin.
POSTGRESQL, JOURNAL = "postgresql://", "journal:"

Bounds = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
WholeBounds = Annotated[list[int], Field(min_length=2, max_length=2)]
Scalar = str | int | float | bool | None


class Parameter(Section):
    """One key of the configuration that is searched: exactly one of `float`, `int` and `choice`.

        {float: [0.03, 0.4], log: true}          a number between two bounds, both included
        {int: [32, 96], step: 16}
        {choice: [max, mean]}                    also of a group: {choice: [fast_resnet, resnet18]}
        {choice: {muon: {name: muon, ...}, ...}} sections, by a label
        {..., when: {model.optimizer: muon}}     only where an earlier parameter has this value, or one of a list

    A key may be searched in several ways under several conditions: `KEY@TEXT` tells them apart.
    """

    model_config = pydantic.ConfigDict(populate_by_name=True)

    real: Bounds | None = Field(None, alias="float")
    whole: WholeBounds | None = Field(None, alias="int")
    choice: Annotated[list[Scalar], Field(min_length=1)] | Annotated[dict[str, Any], Field(min_length=1)] | None = None
    log: bool = False
    step: Positive | None = None
    when: dict[str, Scalar | list[Scalar]] = Field({})

    @pydantic.model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if sum(kind is not None for kind in (self.real, self.whole, self.choice)) != 1:
            raise ValueError("give exactly one of float, int and choice")
        if self.choice is not None and (self.log or self.step):
            raise ValueError("log and step are for float and int")
        if self.log and self.step:
            raise ValueError("log and step exclude each other")
        low, high = self.real or self.whole or (0, 0)
        if low > high:
            raise ValueError(f"the lower bound {low:g} is above the upper one {high:g}")
        if self.log and low <= 0:
            raise ValueError(f"a logarithmic range starts above zero, not at {low:g}")
        if self.whole and self.step and self.step != int(self.step):
            raise ValueError("the step of an int is whole")
        return self

    @property
    def labels(self) -> list[Scalar]:
        """What Optuna chooses among, of a `choice`."""
        return list(self.choice or ())

    def suggest(self, trial: Trial, name: str) -> Scalar:
        """Optuna's suggestion: a number, or a choice's label."""
        if self.real:
            return trial.suggest_float(name, *self.real, step=self.step, log=self.log)
        if self.whole:
            return trial.suggest_int(name, *self.whole, step=int(self.step or 1), log=self.log)
        return trial.suggest_categorical(name, self.labels)

    def value(self, suggested: Any) -> Any:
        """What the configuration gets for a suggestion."""
        return self.choice[suggested] if isinstance(self.choice, dict) else suggested

    def grid(self) -> list[Scalar] | None:
        """All values; None where they can't be counted."""
        if self.choice is not None:
            return self.labels
        if self.whole:
            return None if self.log else list(range(self.whole[0], self.whole[1] + 1, int(self.step or 1)))
        if self.real and self.step:
            low, high = self.real
            return [low + i * self.step for i in range(int((high - low) / self.step + 1e-9) + 1)]
        return None

    def edges(self) -> list[Any]:
        """The suggestions at which a value that is not allowed shows: both bounds, or every choice."""
        return self.labels or list(dict.fromkeys(self.real or self.whole or ()))

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        """Whether its conditions hold among what was suggested so far."""
        return all(key in chosen and chosen[key] in listed(wanted) for key, wanted in self.when.items())


class Resources(Section):
    """What a trial gets of a cluster."""

    cpus: PositiveInt = 1  # also its threads, unless trainer.threads says otherwise
    gpus: NonNegativeInt = 0
    memory_gb: Positive | None = None


class Sweep(Section):
    """What is searched, how, and for how long. A file per experiment: conf/sweep/."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None  # null: experiment-profile
    space: Annotated[dict[str, Parameter], Field(min_length=1)]
    objectives: dict[str, Literal["max", "min"]] = Field({})  # none: trainer.monitor; several: a Pareto front
    sampler: Literal["tpe", "random", "grid", "gp", "cmaes"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    trials: PositiveInt | None = 20  # that came to an end, failed and pruned ones included
    minutes: Positive | None = None  # after which no trial starts, all sessions of the study together
    workers: PositiveInt = 1  # processes; with more than one, who is first decides what the next trial knows
    retries: NonNegativeInt = 2  # of a trial whose process was killed
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the suggestions; the trainings have the configuration's

    # More than one machine: docs/sweeps.md.
    storage: str | None = None  # null: SQLite in the study's folder; postgresql://..., journal:PATH
    heartbeat_s: PositiveInt = 60  # five missed ones, and another process takes a trial over
    launcher: Literal["local", "ray", "submitit"] = "local"
    resources: Resources = Resources()  # of a trial on a cluster
    host: str | None = None  # how the cluster reaches this machine; null: found out
    address: str = "auto"  # of the Ray cluster: auto, or ray://HOST:PORT
    cluster: Literal["slurm", "local"] = "slurm"  # submitit's executor
    slurm: dict[str, Scalar] = Field({})  # its parameters: partition, time (minutes), account, qos, ...

    @pydantic.field_validator("storage")
    @classmethod
    def _known(cls, storage: str | None) -> str | None:
        if storage is not None and not re.match(f"({POSTGRESQL}|{JOURNAL}).", storage):
            raise ValueError("is none of null, postgresql://USER@HOST/DATABASE, journal:PATH")
        return storage


class SweepConfig(Config):
    """A whole configuration, and what of it is searched."""

    sweep: Sweep

    @property
    def study(self) -> str:
        """The study's name."""
        return self.sweep.study or f"{self.name}-{self.profile.name}"

    @property
    def objectives(self) -> dict[str, Literal["max", "min"]]:
        """Metric by metric, whether more or less is better."""
        return self.sweep.objectives or {self.trainer.monitor: monitor_direction(self)}

    @property
    def search(self) -> dict[str, Any]:
        """What of the sweep stays the same for as long as the study lives."""
        return {key: value for key, value in plain(self.sweep).items() if key in ("space", "sampler", "pruner", "seed")}

    def plain(self) -> dict[str, Any]:
        """What a trial's configuration starts from."""
        return {key: value for key, value in super().plain().items() if key != "sweep"}


def suggested(space: Mapping[str, Parameter], trial: Trial) -> dict[str, Scalar]:
    """One point of the space, in the space's order."""
    chosen: dict[str, Scalar] = {}
    for name, parameter in space.items():
        if parameter.applies(chosen):
            chosen[name] = parameter.suggest(trial, name)
    return chosen


def assignments(space: Mapping[str, Parameter], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration key -> value, for what was suggested."""
    return {name.partition("@")[0]: space[name].value(chosen[name]) for name in space if name in chosen}


def configured(
    space: Mapping[str, Parameter], chosen: Mapping[str, Any], given: Sequence[str], output: str = "."
) -> Config:
    """The configuration of a trial: what Hydra's overrides `given` say, and what was suggested.

    The same as composing with all of them as overrides, in a tenth of the time: only what the trials share, and what
    they choose of groups, is composed, once.

    Raises:
        ConfigError: with one line per fault.
    """
    values = assignments(space, chosen)
    groups = [f"{key}={value}" for key, value in values.items() if _is_group(key)]
    content = copy.deepcopy(_composed((*given, *groups)))
    for key, value in values.items():
        if not _is_group(key):
            OmegaConf.update(content, key, value, merge=False, force_add=True)
    content.output = output
    return check(content)


@functools.lru_cache(maxsize=32)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
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
        each = parameter.grid()
        if each is None:
            raise ConfigError(f"sweep.space.{name}: a grid needs steps; give it a step, or use another sweep.sampler")
        if parameter.when:
            raise ConfigError(f"sweep.space.{name}.when: a grid knows no conditions; use another sweep.sampler")
        values[name] = each
    return values


def listed(wanted: Any) -> list[Any]:
    """A condition's value, or values, as a list."""
    return wanted if isinstance(wanted, list) else [wanted]


def points(values: Mapping[str, list[Scalar]]) -> int:
    """How many points a grid has."""
    return math.prod(map(len, values.values()))


def nested(assignments: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings, as params.yaml has them; a key below a group's choice keeps its dots."""
    tree: dict[str, Any] = {}
    for key, value in assignments.items():
        *path, last = key.split(".")
        here: Any = tree
        for part in path:
            here = here.setdefault(part, {}) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here[last] = dict(value) if isinstance(value, Mapping) else value
        else:
            tree[key] = value
    return tree
