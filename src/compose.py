"""Stage `compose`: what DVC's stages read, resolved from `conf/` and `params.yaml` into files that are committed.

    python -m src.compose data NAME         -> data/NAME.yaml
    python -m src.compose experiment NAME   -> experiments/NAME/config.yaml

`params.yaml` says which experiments DVC runs, with which profile and overrides. An override `default` means: as `conf/`
says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from src.common.errors import ConfigError
from src.common.paths import ROOT
from src.configuration.composing import compose, overrides_of, write_resolved
from src.configuration.refusing import refusal
from src.configuration.schema import Config


def data_overrides(params: Mapping[str, Any], name: str) -> list[str]:
    """What params.yaml says of a data set."""
    return list(overrides_of(params["data"][name] or {}, "data."))


def compose_experiment(params: Mapping[str, Any], name: str) -> Config:
    """The configuration of one experiment of params.yaml.

    Raises:
        ConfigError: it is refused, or it wants the shared data packed differently than params.yaml's `data` says.
    """
    chosen = params["experiments"][name] or {}
    common = [f"experiment={name}", f"profile={params['profile']}", f"output=experiments/{name}"]
    shared = compose([*common, f"trainer={params['trainer']}"])
    if shared.data.name not in params["data"]:
        raise ConfigError(
            f"data.{shared.data.name}: not in params.yaml, but {name} needs it; add the line `{shared.data.name}: {{}}`"
        )
    own = list(overrides_of(chosen.get("overrides", {})))
    config = compose([*common, f"trainer={params['trainer']}", *data_overrides(params, shared.data.name), *own])
    prepared = compose_data(params, config.data.name)
    for key, value in config.packing.items():
        if value != prepared.packing[key]:
            raise ConfigError(
                f"experiments.{name}: data.{key} is {value!r}, but data/processed is shared and packed with "
                f"{prepared.packing[key]!r}; set it under data.{config.data.name} in params.yaml"
            )
    # DVC watches the packed <data> and src/models/<model>.py: with other names there it would say "up to date" of what
    # has changed.
    if chosen.get("data") != config.data.name:
        used = config.data.name
        raise ConfigError(
            f"experiments.{name}.data: is {chosen.get('data')!r}, but {used} is used; write {used!r} there"
        )
    watched = {f"src.models.{chosen.get('model')}", "src.models.classifier"}
    for target in targets_of(config.plain()["model"]):
        if (module := target.rpartition(".")[0]) not in watched:
            name_of = module.rpartition(".")[2]
            raise ConfigError(
                f"experiments.{name}.model: is {chosen.get('model')!r}, but {module} is used; write {name_of!r} there"
            )
    return config


def targets_of(section: Any) -> Iterator[str]:
    """Every `_target_` in a section."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            yield from [value] if key == "_target_" else targets_of(value)


def compose_data(params: Mapping[str, Any], name: str) -> Config:
    """The configuration of one data set of params.yaml, with the first experiment that uses it for the rest."""
    user = next((e for e in params["experiments"] if compose([f"experiment={e}", "output=."]).data.name == name), None)
    if user is None:
        raise ConfigError(f"data.{name}: no experiment in params.yaml uses it; remove the line")
    return compose([f"experiment={user}", f"profile={params['profile']}", "output=.", *data_overrides(params, name)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m src.compose", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=["data", "experiment"])
    parser.add_argument("name", help="a key of params.yaml's `data` or `experiments`")
    arguments = parser.parse_args()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    try:
        if arguments.name not in params["data" if arguments.kind == "data" else "experiments"]:
            raise ConfigError(f"{arguments.name}: not in params.yaml")
        if arguments.kind == "data":
            config, path = compose_data(params, arguments.name), ROOT / "data" / f"{arguments.name}.yaml"
            content = config.plain()
            content = {"profile": content["profile"], "data": content["data"]}
            del content["data"]["loader"]
        else:
            config, path = (
                compose_experiment(params, arguments.name),
                ROOT / "experiments" / arguments.name / "config.yaml",
            )
            content = config.plain()
    except ConfigError as error:
        sys.exit(refusal(str(error)))
    write_resolved(path, content)


if __name__ == "__main__":
    main()
