"""What tasks and kinds of data declare, as composition needs it: options, metrics, and which model fits which data.

Tasks and kinds stand in rooms above this one; they are looked up by name, as a `_target_` is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from src.common.errors import ConfigError
from src.common.paths import CONF, ROOT
from src.configuration.metrics import Direction, Metric, monitors
from src.configuration.refusing import listed, nearest
from src.configuration.schema import Config, Evaluation, Loader
from src.configuration.targets import attribute_of, target_in

KINDS, TASKS = "src.data.kinds", "src.tasks"


class KindOptions(Protocol):
    """What composition reads of a kind of data: the keys that `data.loader` takes."""

    options: type[Loader]


class TaskOptions(Protocol):
    """What composition reads of a task."""

    takes: tuple[str, ...]  # kinds of data
    metrics: Mapping[str, Metric]
    options: type[Evaluation]  # the keys that `evaluation` takes


def load_kind(name: str) -> Any:
    """The constant `KIND` of src/data/kinds/NAME.py.

    Raises:
        ConfigError: there is no such file.
    """
    return _load(KINDS, "KIND", name)


def load_task(name: str) -> Any:
    """The constant `TASK` of src/tasks/NAME.py.

    Raises:
        ConfigError: there is no such file.
    """
    return _load(TASKS, "TASK", name)


def _load(room: str, constant: str, name: str) -> Any:
    if name not in (names := _names(room)):
        raise ConfigError(f"{room}.{name}: is not there; there are {listed(names)}{nearest(name, names)}")
    return getattr(importlib.import_module(f"{room}.{name}"), constant)


def _names(room: str) -> list[str]:
    """The modules of a room that declare a task or a kind."""
    return sorted(path.stem for path in ROOT.joinpath(*room.split(".")).glob("[a-z]*.py"))


def kind_of(section: Any) -> str | None:
    """The kind of data that a `data` section's class declares; None: its class declares none.

    Raises:
        ConfigError: the section has no target.
    """
    return _declared(section, "data", "kind")


def task_of(section: Any) -> str:
    """The task that a `model` section's class declares.

    Raises:
        ConfigError: the section has no target, or its class declares no task.
    """
    task: str | None = _declared(section, "model", "task")
    if task is None:
        target = target_in(section, "model")
        raise ConfigError(f"model._target_: {target!r} declares no task; allowed: {listed(_names(TASKS))}")
    return task


def _declared(section: Any, path: str, attribute: str) -> Any:
    target = target_in(section, path)
    try:
        return attribute_of(target, attribute)
    except ValueError as error:
        raise ConfigError(f"{path}._target_: {target!r} {error}") from None


def kinds_taken(section: Any) -> tuple[str, ...]:
    """The kinds of data that a `model` section's class trains on: its own `takes`, or all that its task takes."""
    task: TaskOptions = load_task(task_of(section))
    takes: tuple[str, ...] | None = _declared(section, "model", "takes")
    return task.takes if takes is None else takes


def refuse_misfit(data: Any, model: Any) -> None:
    """Refuses a model on data of a kind that it does not take.

    Raises:
        ConfigError: naming the data sets that fit.
    """
    kind, takes = kind_of(data), kinds_taken(model)
    if kind is None or kind in takes:
        return
    fitting = [name for name, other in _data_sets() if other in takes]
    raise ConfigError(
        f"data: {data.get('name')} holds {kind}, and {target_in(model, 'model')} ({task_of(model)}) takes "
        f"{' or '.join(takes)}; data sets that fit: {', '.join(fitting) or 'none'}"
    )


def _data_sets() -> Iterator[tuple[str, str | None]]:
    """The choices of the group `data`, each with its kind."""
    for path in sorted((CONF / "data").glob("*.yaml")):
        content = _with_defaults(path)
        yield path.stem, kind_of(content)


def _with_defaults(path: Path) -> dict[str, Any]:
    """A data set's file on top of those that its defaults list names."""
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    for name in content.get("defaults", []):
        if isinstance(name, str) and name != "_self_":
            content = _with_defaults(path.with_name(f"{name}.yaml")) | content
    return content


def owners_of(key: str) -> str:
    """A hint for a refused key of `data.loader` or `evaluation`: whose option it is, or nothing."""
    section, _, name = key.rpartition(".")
    room, constant = {"data.loader": (KINDS, "KIND"), "evaluation": (TASKS, "TASK")}.get(section, ("", ""))
    owners = (
        [owner for owner in _names(room) if name in _load(room, constant, owner).options.model_fields] if room else []
    )
    return f" ({name} is for {' and '.join(owners)})" if owners else ""


def metrics_of(config: Config) -> Mapping[str, Metric]:
    """The metrics of the configured model's task."""
    task: TaskOptions = load_task(task_of({"_target_": config.model.target}))
    return task.metrics


def monitor_direction(config: Config) -> Direction:
    """Whether more or less of `trainer.monitor` is better."""
    return monitors(metrics_of(config))[config.trainer.monitor]


def refuse_monitor(config: Config) -> None:
    """Refuses a `trainer.monitor` that the task does not measure.

    Raises:
        ConfigError: naming those that it measures.
    """
    monitor, allowed = config.trainer.monitor, monitors(metrics_of(config))
    if monitor not in allowed:
        task = task_of({"_target_": config.model.target})
        raise ConfigError(
            f"trainer.monitor: {monitor!r} is not measured by {task}; allowed: {listed(allowed)}"
            f"{nearest(monitor, allowed)}"
        )
