"""Stage `compose`: what DVC's stages read, resolved from `conf/` and `params.yaml` into files that are committed.

    python -m src.compose data NAME         -> data/NAME.yaml, data/NAME.code.yaml
    python -m src.compose experiment NAME   -> experiments/NAME/config.yaml, experiments/NAME/code.yaml
    python -m src.compose                   -> all of them

`params.yaml` says which experiments DVC runs, with which profile and overrides. An override `default` means: as `conf/`
says. The code files hold a fingerprint for each stage, and the modules and packages behind it: DVC runs a stage again
when its fingerprint changes, and `git diff` shows which module did it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.credentials import masked
from src.common.errors import ConfigError
from src.common.files import write_text_atomically
from src.common.paths import ROOT
from src.common.yaml_files import dump_yaml
from src.configuration.composing import compose, overrides_of, write_resolved
from src.configuration.fingerprints import DATA_STAGES, archive_fingerprint, stage_code, weights_fingerprint
from src.configuration.params import read_params
from src.configuration.refusing import refusal
from src.configuration.schema import Config

CODE_HEADER = "# Fingerprints of the code that each stage executes, written by src/compose.py.\n"


def data_overrides(params: Mapping[str, Any], name: str) -> list[str]:
    """What params.yaml says of a data set, as Hydra's overrides."""
    return list(overrides_of(params["data"][name] or {}, "data."))


def compose_experiment(params: Mapping[str, Any], name: str) -> Config:
    """The configuration of one experiment that params.yaml runs.

    Raises:
        ConfigError: it is refused, or it wants the shared data packed differently than params.yaml's `data` says.
    """
    common = [f"experiment={name}", f"profile={params['profile']}", f"output=experiments/{name}"]
    common.append(f"trainer={params['trainer']}")
    used = compose(common).data.name
    if used not in params["data"]:
        raise ConfigError(f"data.{used}: not in params.yaml, but {name} needs it; add the line `{used}: {{}}`")
    own = (params.get("experiments") or {}).get(name) or {}
    config = compose([*common, *data_overrides(params, used), *overrides_of(own.get("overrides") or {})])
    # DVC watches the data set that `run` names: with another one there it would say "up to date" of what has changed.
    if params["run"][name] != config.data.name:
        used = config.data.name
        raise ConfigError(f"run.{name}: is {params['run'][name]!r}, but {used} is used; write {used!r} there")
    shared = compose_data(params, config.data.name)
    for key, value in config.packing.items():
        if value != shared.packing[key]:
            raise ConfigError(
                f"experiments.{name}: data.{key} is {value!r}, but data/processed is shared and packed with "
                f"{shared.packing[key]!r}; set it under data.{config.data.name} in params.yaml"
            )
    return config


def compose_data(params: Mapping[str, Any], name: str) -> Config:
    """The configuration of one data set of params.yaml, with the first experiment that uses it for the rest."""
    user = next((experiment for experiment, data in params["run"].items() if data == name), None)
    if user is None:
        raise ConfigError(f"data.{name}: no experiment that params.yaml runs uses it; remove the line")
    config = compose([f"experiment={user}", f"profile={params['profile']}", "output=.", *data_overrides(params, name)])
    if (archive := config.data.archive or "") != masked(archive):
        raise ConfigError(
            f"data.{name}.archive: {archive} holds a credential that dvc.lock would keep: put a password into "
            "~/.netrc, or download the archive and name its file"
        )
    return config


def write_experiment(params: Mapping[str, Any], name: str) -> None:
    """Composes one experiment and writes its two files.

    Raises:
        ConfigError: it is refused.
    """
    config = compose_experiment(params, name)
    folder = ROOT / "experiments" / name
    write_resolved(folder / "config.yaml", config.record())
    codes = {stage: stage_code(stage, config) for stage in ("train", "evaluate", "export")}
    _write_code(
        folder / "code.yaml",
        {"weights": weights_fingerprint(config)} | {stage: code.fingerprint for stage, code in codes.items()},
        modules={name: digest for code in codes.values() for name, digest in code.modules.items()},
        packages={name: version for code in codes.values() for name, version in code.packages.items()},
    )


def write_data(params: Mapping[str, Any], name: str) -> None:
    """Composes one data set and writes its two files.

    Raises:
        ConfigError: it is refused.
    """
    config = compose_data(params, name)
    content = {key: value for key, value in config.plain().items() if key in ("profile", "data")}
    del content["data"]["loader"]
    write_resolved(ROOT / "data" / f"{name}.yaml", content | {"packing": config.packing})
    codes = {stage: stage_code(stage, config) for stage in DATA_STAGES}
    _write_code(
        ROOT / "data" / f"{name}.code.yaml",
        {"download": archive_fingerprint(config)} | {stage: code.fingerprint for stage, code in codes.items()},
        modules={name: digest for code in codes.values() for name, digest in code.modules.items()},
        packages={name: version for code in codes.values() for name, version in code.packages.items()},
    )


def _write_code(path: Path, fingerprints: Mapping[str, str], **behind: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(fingerprints) | {key: dict(sorted(values.items())) for key, values in behind.items()}
    write_text_atomically(path, CODE_HEADER + dump_yaml(content))


def main() -> None:
    """The command; exit codes: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m src.compose", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=["data", "experiment"], help="what to compose (default: all)")
    parser.add_argument("name", nargs="?", help="a key of params.yaml's `data` or `run`")
    arguments = parser.parse_args()
    try:
        params = read_params()
        writers = {"data": (write_data, params["data"]), "experiment": (write_experiment, params["run"])}
        for kind in [arguments.kind] if arguments.kind else writers:
            write, names = writers[kind]
            if arguments.name and arguments.name not in names:
                raise ConfigError(f"{arguments.name}: not in params.yaml")
            for name in [arguments.name] if arguments.name else names:
                write(params, name)
    except ConfigError as error:
        sys.exit(refusal(str(error)))


if __name__ == "__main__":
    main()
