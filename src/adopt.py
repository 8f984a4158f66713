"""Makes what a sweep found the configuration that DVC runs: writes it into params.yaml, whose comments stay.

python -m src.adopt cifar10_resnet experiments/sweeps/STUDY/best.yaml
dvc repro
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import yaml

from src.common.errors import ConfigError
from src.common.paths import ROOT
from src.compose import compose_experiment
from src.configuration.refusing import refusal

PARAMS = ROOT / "params.yaml"


def adopt(experiment: str, best: Path) -> None:
    """Merges the file `best` into the overrides of an experiment in params.yaml.

    Raises:
        ConfigError: the experiment is not in params.yaml, the file holds no overrides, or what comes of it is refused;
            params.yaml is then as it was.
    """
    from dvc.utils.serialize import modify_yaml

    before = PARAMS.read_text()
    if experiment not in (known := yaml.safe_load(before)["experiments"]):
        raise ConfigError(f"experiments.{experiment}: not in params.yaml, which has {', '.join(known)}")
    try:
        found = yaml.safe_load(best.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{best}: {' '.join(str(error).split())}; a sweep writes such a file") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{best}: holds no keys and values; a sweep writes such a file")
    try:
        with modify_yaml(PARAMS) as params:
            chosen = params["experiments"][experiment]
            chosen["overrides"] = merged(chosen.get("overrides") or {}, found)
        compose_experiment(yaml.safe_load(PARAMS.read_text()), experiment)
    except BaseException:
        PARAMS.write_text(before)
        raise


def merged(into: MutableMapping[str, Any], values: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """`into`, changed in place, with `values` in it, section by section."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), MutableMapping):
            merged(into[key], value)
        else:
            into[key] = value
    return into


def main() -> None:
    """The command; exit codes: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m src.adopt", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiment", help="a key of params.yaml's `experiments`")
    parser.add_argument("best", type=Path, help="a file that a sweep wrote: best.yaml, or one of front/")
    arguments = parser.parse_args()
    try:
        adopt(arguments.experiment, arguments.best)
    except ConfigError as error:
        sys.exit(refusal(str(error)))
    print(f"params.yaml: experiments.{arguments.experiment}.overrides has it; `dvc repro` makes it the result")


if __name__ == "__main__":
    main()
