"""Copies a sweep's best trial into params.yaml, so that `dvc repro` trains it; comments in params.yaml stay.

python -m src.adopt cifar10_resnet experiments/sweeps/STUDY/best.yaml
dvc repro
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from src.common.errors import ConfigError
from src.common.files import write_text_atomically
from src.common.yaml_files import read_yaml
from src.compose import compose_experiment
from src.configuration.params import PARAMS, read_params
from src.configuration.refusing import refusal


def adopt(experiment: str, best: Path) -> None:
    """Merges the overrides in the file `best` into those of an experiment in params.yaml.

    Raises:
        ConfigError: params.yaml has no such experiment, the file holds no overrides, or the resulting configuration is
            refused; params.yaml is then unchanged.
    """
    from dvc.utils.serialize import modify_yaml

    original = PARAMS.read_text()
    if experiment not in (experiments := read_params()["run"]):
        raise ConfigError(f"run.{experiment}: not in params.yaml, which runs {', '.join(experiments)}; add it there")
    try:
        overrides = read_yaml(best)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{best}: {error}; a sweep writes such a file") from None
    if not isinstance(overrides, dict):
        raise ConfigError(f"{best}: holds no keys and values; a sweep writes such a file")
    try:
        with modify_yaml(PARAMS) as params:
            section = params.setdefault("experiments", {}).setdefault(experiment, {})
            section["overrides"] = merge(section.get("overrides") or {}, overrides)
        compose_experiment(read_params(), experiment)
    except BaseException:
        write_text_atomically(PARAMS, original)
        raise


def merge(target: MutableMapping[str, Any], values: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """Merges `values` into `target`, section by section, and returns it."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), MutableMapping):
            merge(target[key], value)
        else:
            target[key] = value
    return target


def main() -> None:
    """The command; exit codes: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m src.adopt", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiment", help="a key of `run` in params.yaml")
    parser.add_argument("best", type=Path, help="a file that a sweep wrote: best.yaml, or one of front/")
    arguments = parser.parse_args()
    try:
        adopt(arguments.experiment, arguments.best)
    except ConfigError as error:
        sys.exit(refusal(str(error)))
    print(f"params.yaml: experiments.{arguments.experiment}.overrides is updated; `dvc repro` trains it")


if __name__ == "__main__":
    main()
