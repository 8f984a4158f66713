"""A model's weights as a safetensors file, whose bytes depend only on the weights, with a sha256 beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.errors import Failure
from src.common.files import sha256_of, write_atomically, write_text_atomically
from src.configuration.schema import Build
from src.models.base import Model

NAME = "model.safetensors"
NOTE = "model.json"


def save(model: Model, folder: Path, **facts: Any) -> str:
    """Writes the weights, fp32, and `model.json` with their sha256 and `facts`; returns the sha256."""
    from safetensors.torch import save as serialized

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(folder / NAME, serialized(tensors))
    sha256 = sha256_of(folder / NAME)
    parameters = sum(p.numel() for p in model.parameters())
    note = {"sha256": sha256, "parameters": parameters} | facts
    if model.architecture is not None:
        note["architecture"] = dict(model.architecture)
    write_text_atomically(folder / NOTE, json.dumps(note, indent=1, sort_keys=True) + "\n")
    return sha256


def read_note(folder: Path) -> dict[str, Any]:
    """The content of the `model.json` that `save` wrote.

    Raises:
        Failure: no model was trained in this folder.
    """
    try:
        return json.loads((folder / NOTE).read_text())
    except (OSError, ValueError) as error:
        raise Failure(
            f"{folder / NOTE} can't be read ({error}): train first, with `dvc repro` or `python -m src.train`"
        ) from None


def load(model: Build, meta: Mapping[str, Any], folder: Path) -> Model:
    """Builds the configured model in evaluation mode, with the weights of `folder`.

    Raises:
        Failure: the file is missing, damaged, or of another model.
    """
    from safetensors.torch import load_file

    note, path = read_note(folder), folder / NAME
    if not path.is_file():
        raise Failure(f"{path} is missing: train again, or `dvc checkout`")
    if (digest := sha256_of(path)) != note["sha256"]:
        raise Failure(
            f"{path} is damaged (sha256 {digest[:12]}…, {note['sha256'][:12]}… was written): delete it and train again"
        )
    module: Model = model({**meta, **{key: note[key] for key in ("architecture",) if key in note}})
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise Failure(
            f"{path} is of another model than the configuration's: {' '.join(str(error).split())[:300]}"
        ) from None
    return module.eval()
