"""What of a sweep can't be right, said before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from src.common.errors import ConfigError
from src.configuration.declarations import metrics_of
from src.configuration.metrics import monitors
from src.configuration.refusing import listed as names
from src.configuration.refusing import nearest
from src.sweeping.space import LATENCY, PARAMETERS, Parameter, Sweep, SweepConfig, configured, grid, listed

# The launchers that heed a key.
USED_BY = {
    "resources": ("ray", "submitit"),
    "host": ("ray", "submitit"),
    "address": ("ray",),
    "cluster": ("submitit",),
    "slurm": ("submitit",),
}


def refuse(config: SweepConfig, given: Sequence[str]) -> None:
    """Holds the sweep against the configuration before anything starts; `given`: the overrides all trials share.

    Raises:
        ConfigError: with one line per fault, such as a bound that the schema does not allow.
    """
    faults = [*_faults_of_conditions(config.sweep.space), *_faults_of_methods(config)]
    if not faults:
        faults = list(_faults_of_values(config.sweep.space, given))
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    if config.sweep.sampler == "grid":
        grid(config.sweep.space)


def _faults_of_conditions(space: Mapping[str, Parameter]) -> Iterator[str]:
    earlier: list[str] = []
    for name, parameter in space.items():
        for key, wanted in parameter.when.items():
            if key not in earlier:
                yield f"sweep.space.{name}.when: {key!r} is no earlier parameter of the space: {', '.join(earlier)}"
            elif unknown := [value for value in listed(wanted) if value not in (space[key].grid() or listed(wanted))]:
                yield f"sweep.space.{name}.when.{key}: {unknown[0]!r} is none of its values: {space[key].grid()}"
        earlier.append(name)


def _faults_of_methods(config: SweepConfig) -> Iterator[str]:
    sweep, several = config.sweep, len(config.objectives) > 1
    allowed = monitors(metrics_of(config)) | dict.fromkeys((PARAMETERS, LATENCY), "min")
    for metric, direction in config.objectives.items():
        if metric not in allowed:
            yield f"sweep.objectives.{metric}: is no objective; allowed: {names(allowed)}{nearest(metric, allowed)}"
        elif direction != allowed[metric]:
            yield f"sweep.objectives.{metric}: {direction} makes it worse; write {allowed[metric]}"
    if several and sweep.pruner != "none":
        yield "sweep.pruner: with several objectives nothing is pruned; say sweep.pruner=none"
    if several and sweep.sampler == "cmaes":
        yield "sweep.sampler: cmaes knows one objective only; use tpe, gp or random"
    yield from _faults_of_launchers(config)
    if sweep.trials is None and sweep.minutes is None:
        yield "sweep.trials: neither trials nor minutes are given; a sweep needs a budget"
    if config.trainer.num_nodes > 1:
        yield "trainer.num_nodes: the processes of a trial are on one node; use trainer.devices, and sweep.workers"


def _faults_of_launchers(config: SweepConfig) -> Iterator[str]:
    """Keys that would be passed over in silence, and trials that would find no GPU."""
    sweep = config.sweep
    for key, launchers in USED_BY.items():
        if getattr(sweep, key) != Sweep.model_fields[key].default and sweep.launcher not in launchers:
            yield f"sweep.{key}: says nothing to sweep.launcher={sweep.launcher}; it is for {' and '.join(launchers)}"
    if sweep.launcher != "local" and config.trainer.accelerator == "gpu" and not sweep.resources.gpus:
        yield "sweep.resources.gpus: is 0, and trainer.accelerator=gpu needs one; say sweep.resources.gpus=1"


def _faults_of_values(space: Mapping[str, Parameter], given: Sequence[str]) -> Iterator[str]:
    """Composes every edge; many at once as long as nothing is refused, then each alone, to name the one at fault."""
    known: set[tuple[str, Any]] = set()
    for turn in range(max(len(parameter.edges()) for parameter in space.values())):
        chosen: dict[str, Any] = {}
        for name, parameter in space.items():
            if parameter.applies(chosen):
                edges = parameter.edges()
                chosen[name] = edges[min(turn, len(edges) - 1)]
        if not _refusals(space, chosen, given):
            known |= chosen.items()
    for name, parameter in space.items():
        for edge in parameter.edges():
            if (name, edge) not in known:
                chosen = {**_conditions(space, name), name: edge}
                yield from (f"sweep.space.{name}: at {edge!r}: {line}" for line in _refusals(space, chosen, given))


def _refusals(space: Mapping[str, Parameter], chosen: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    try:
        configured(space, chosen, given)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _conditions(space: Mapping[str, Parameter], name: str) -> dict[str, Any]:
    """Suggestions under which a parameter applies."""
    chosen: dict[str, Any] = {}
    for key, wanted in space[name].when.items():
        chosen |= {**_conditions(space, key), key: listed(wanted)[0]}
    return chosen
