"""The weights that a training begins with: those of a pretrained network, those of an earlier run, or neither.

They lie in a folder of their own: `pretrained/`, `init/` with the weights of the earlier run, and `source.json`. Under
DVC it is the output of the stage `weights`; a direct run that wants others makes its own in data/direct/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.console import console
from src.common.errors import Failure
from src.common.files import sha256_of, write_text_atomically
from src.common.paths import input_path
from src.common.run_folder import RunFolder
from src.configuration.fingerprints import weights_fingerprint
from src.configuration.schema import Config
from src.configuration.targets import attribute_of
from src.data.fetching.pretrained import CONFIG, WEIGHTS, obtain_pretrained
from src.data.preparing import DIRECT, locked
from src.tracking.recorded_weights import recorded_weights

if TYPE_CHECKING:
    from src.models.base import Model

NOTE, PRETRAINED, INIT = "source.json", "pretrained", "init"


def obtain_weights(config: Config) -> dict[str, Any]:
    """Fills the folder `config.start`; returns its note: of each source its sha256 and where it came from.

    Raises:
        SourceError: pretrained weights can't be had, or are not what their checksum says.
        Failure: the earlier run is unknown, or its weights are damaged.
    """
    folder = config.start
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    note: dict[str, Any] = {"fingerprint": weights_fingerprint(config)}
    if config.pretrained:
        library = attribute_of(config.model.target, "library")
        note[PRETRAINED] = obtain_pretrained(config.pretrained, library, folder / PRETRAINED)
    if config.init_from:
        note[INIT] = _obtain_run(config.init_from, folder / INIT)
    for part in (PRETRAINED, INIT):
        if (path := folder / part / WEIGHTS).is_file():
            note[part]["file_sha256"] = sha256_of(path)
    write_text_atomically(folder / NOTE, json.dumps(note, indent=1, sort_keys=True) + "\n")
    return note


def with_weights(config: Config) -> Config:
    """The configuration with the folder of the weights that it begins with: DVC's where it fits, or one made here.

    Raises:
        SourceError: as `obtain_weights`.
        Failure: as `obtain_weights`.
    """
    wanted = weights_fingerprint(config)
    if wanted == "none" or _read_note(config).get("fingerprint") == wanted:
        return config
    folder = f"{DIRECT}/weights/{wanted[:8]}"
    own = config.model_copy(update={"weights_folder": folder})
    with locked(f"{folder}.lock"):
        if _read_note(own).get("fingerprint") != wanted:
            obtain_weights(own)
    return own


def digests(config: Config) -> dict[str, str]:
    """The sha256 of the weights that training begins with, by where they come from; empty where it begins with none."""
    note = _read_note(config) if weights_fingerprint(config) != "none" else {}
    return {part: note[part]["file_sha256"] for part in (PRETRAINED, INIT) if "file_sha256" in note.get(part, {})}


def weights_tags(config: Config) -> dict[str, str]:
    """What a run's page in MLflow says of the weights that training begins with."""
    note = _read_note(config) if weights_fingerprint(config) != "none" else {}
    return {f"pipeline.{part}.{key}": value for part in (PRETRAINED, INIT) for key, value in note.get(part, {}).items()}


def architecture(config: Config) -> dict[str, Any]:
    """What a model with a pretrained network needs to be built, beside the data's meta: its config.json."""
    path = config.start / PRETRAINED / CONFIG
    return {"architecture": json.loads(path.read_text())} if config.pretrained else {}


def load_start(model: Model, config: Config) -> None:
    """Gives a new model the weights that its training begins with.

    Raises:
        Failure: a file changed since it was fetched, or is of another model.
    """
    for part, sha256 in digests(config).items():
        path = config.start / part / WEIGHTS
        if not path.is_file() or sha256_of(path) != sha256:
            raise Failure(f"{path} is missing or damaged: delete {config.start} and run the same command again")
        if part == PRETRAINED:
            model.load_pretrained(path.parent)
        else:
            _load_run(model, path, str(config.init_from))


def _load_run(model: Model, path: Path, name: str) -> None:
    """Copies the tensors of an earlier run that have the same name and shape; says which have not.

    Raises:
        Failure: there are none.
    """
    from safetensors.torch import load_file

    tensors, own = load_file(path), model.state_dict()
    fitting = {key: value for key, value in tensors.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise Failure(f"init_from: no tensor of {name} has a name and a shape of this model: choose a run of the same")
    model.load_state_dict(fitting, strict=False)
    others = sorted(own.keys() - fitting.keys())
    new = f"; new: {', '.join(others[:6])}{' …' if len(others) > 6 else ''}" if others else ""
    console.print(f"begins with {len(fitting)} of {len(own)} tensors of {name}{new}")


def _obtain_run(name: str, folder: Path) -> dict[str, str]:
    """Copies the weights of an earlier run, named by its folder or by its id in MLflow.

    Raises:
        Failure: there is no such run, or its weights are nowhere.
    """
    folder.mkdir(parents=True)
    path = input_path(name)
    source, sha256 = _of_folder(path) if path.is_dir() else recorded_weights(name, folder / WEIGHTS)
    if not source.is_file() or sha256_of(source) != sha256:
        raise Failure(f"init_from: {source} is missing or damaged (its sha256 differs): choose another run")
    if source != folder / WEIGHTS:
        shutil.copyfile(source, folder / WEIGHTS)
    return {"sha256": sha256}


def _of_folder(path: Path) -> tuple[Path, str]:
    note = next((p for p in (RunFolder(path).model_note, path / "model.json") if p.is_file()), None)
    if note is None:
        raise Failure(f"init_from: {path} holds no train/model.json: name the folder of a trained run")
    return note.with_name(WEIGHTS), json.loads(note.read_text())["sha256"]


def _read_note(config: Config) -> Mapping[str, Any]:
    try:
        note: dict[str, Any] = json.loads((config.start / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return note
