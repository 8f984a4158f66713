"""Checks a sweep against the configuration, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from src.common.errors import ConfigError
from src.configuration.declarations import metrics_of
from src.configuration.metrics import monitors
from src.configuration.refusing import listed, nearest
from src.sweeping.space import LATENCY, PARAMETERS, Parameter, SweepConfig, as_list, grid, trial_config


def refuse(config: SweepConfig, overrides: Sequence[str]) -> None:
    """Refuses a sweep that can't be right; `overrides`: Hydra's, of all trials.

    Raises:
        ConfigError: with one line per fault, such as a bound that the schema refuses.
    """
    faults = [*_faults_of_conditions(config.sweep.space), *_faults_of_methods(config)]
    if not faults:
        faults = list(_faults_of_values(config.sweep.space, overrides))
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    if config.sweep.sampler == "grid":
        grid(config.sweep.space)


def _faults_of_conditions(space: Mapping[str, Parameter]) -> Iterator[str]:
    earlier: list[str] = []
    for name, parameter in space.items():
        for key, condition in parameter.when.items():
            if key not in earlier:
                yield f"sweep.space.{name}.when: {key!r} is no earlier parameter of the space: {', '.join(earlier)}"
                continue
            values = space[key].grid() or as_list(condition)
            if unknown := [value for value in as_list(condition) if value not in values]:
                yield f"sweep.space.{name}.when.{key}: {unknown[0]!r} is none of its values: {values}"
        earlier.append(name)


def _faults_of_methods(config: SweepConfig) -> Iterator[str]:
    sweep, is_multi_objective = config.sweep, len(config.objectives) > 1
    allowed = monitors(metrics_of(config)) | dict.fromkeys((PARAMETERS, LATENCY), "min")
    for metric, direction in config.objectives.items():
        if metric not in allowed:
            yield f"sweep.objectives.{metric}: is no objective; allowed: {listed(allowed)}{nearest(metric, allowed)}"
        elif direction != allowed[metric]:
            yield f"sweep.objectives.{metric}: {direction} makes it worse; write {allowed[metric]}"
    if is_multi_objective and sweep.pruner != "none":
        yield "sweep.pruner: with several objectives no trial is pruned; set sweep.pruner=none"
    if is_multi_objective and sweep.sampler == "cmaes":
        yield "sweep.sampler: cmaes takes one objective only; use tpe, gp or random"
    if sweep.ray and sweep.storage is None:
        yield "sweep.ray: its processes share a study; set sweep.storage to journal:PATH or postgresql://..."
    if sweep.ray and config.trainer.accelerator == "gpu" and not sweep.ray.gpus:
        yield "sweep.ray.gpus: is 0, and trainer.accelerator=gpu needs one; set sweep.ray.gpus=1"
    if sweep.trials is None and sweep.minutes is None:
        yield "sweep.trials: null, as is sweep.minutes; a sweep needs a budget"
    if config.trainer.num_nodes > 1:
        yield "trainer.num_nodes: the processes of a trial are on one node; use trainer.devices, and sweep.workers"


def _faults_of_values(space: Mapping[str, Parameter], overrides: Sequence[str]) -> Iterator[str]:
    """Composes every edge, many at once while nothing is refused; then the others one by one, to name the fault."""
    accepted: set[tuple[str, Any]] = set()
    for turn in range(max(len(parameter.edges()) for parameter in space.values())):
        suggestions: dict[str, Any] = {}
        for name, parameter in space.items():
            if parameter.applies(suggestions):
                edges = parameter.edges()
                suggestions[name] = edges[min(turn, len(edges) - 1)]
        if not _refusals(space, suggestions, overrides):
            accepted |= suggestions.items()
    for name, parameter in space.items():
        for edge in parameter.edges():
            if (name, edge) not in accepted:
                suggestions = {**_conditions(space, name), name: edge}
                for line in _refusals(space, suggestions, overrides):
                    yield f"sweep.space.{name}: at {edge!r}: {line}"


def _refusals(space: Mapping[str, Parameter], suggestions: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    try:
        trial_config(space, suggestions, overrides)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _conditions(space: Mapping[str, Parameter], name: str) -> dict[str, Any]:
    """Suggestions for earlier parameters with which a parameter applies."""
    suggestions: dict[str, Any] = {}
    for key, condition in space[name].when.items():
        suggestions |= {**_conditions(space, key), key: as_list(condition)[0]}
    return suggestions
