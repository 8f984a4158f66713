"""Obtains the raw archive of a data set: draws, copies or downloads it, and notes where it came from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from src.common.errors import ConfigError
from src.common.files import sha256_of, write_text_atomically
from src.common.paths import ROOT
from src.configuration.fingerprints import archive_fingerprint
from src.configuration.schema import DataConfig, Pretrained
from src.data.fetching.adopting import adopt
from src.data.fetching.official import fetch_official
from src.data.fetching.pretrained import TOKENIZER, obtain_tokenizer
from src.data.raw import NOTE


def obtain_archive(config: DataConfig) -> dict[str, Any]:
    """Puts the archive and `source.json` into the raw folder; returns the note.

    Raises:
        ConfigError: the profile has no source for this data set.
        SourceError: the archive can't be had, or is not what its checksum says.
    """
    folder = config.raw
    data, dataset = config.data, config.data()
    archive = folder / dataset.archive_name
    partial = ROOT / "data" / ".partial"
    folder.mkdir(parents=True, exist_ok=True)
    if config.profile.name == "sample":
        if data.archive:
            raise ConfigError("data.archive: given, but profile=sample draws its own data; add profile=full")
        if dataset.sample is None:
            raise ConfigError(f"profile: {data.name} has no embedded sample; add profile=full")
        importlib.import_module(dataset.sample).draw(archive)
        origin, sha256 = "sample", sha256_of(archive)
    elif data.archive:
        origin, sha256 = Path(data.archive).name, adopt(data.archive, archive, sha256=data.sha256, partial_dir=partial)
    elif data.official:
        origin = data.official.urls[0]
        sha256 = fetch_official(data.official, archive, partial)
    else:
        raise ConfigError(
            f"data.archive: not given, and {data.name} has no official source; add data.archive=PATH_OR_URL"
        )
    if isinstance(tokenizer := getattr(dataset, "tokenizer", None), Pretrained):
        obtain_tokenizer(tokenizer, folder / TOKENIZER)
    note = {
        "origin": origin,
        "archive": archive.name,
        "bytes": archive.stat().st_size,
        "sha256": sha256,
        "fingerprint": archive_fingerprint(config),
    }
    write_text_atomically(folder / NOTE, json.dumps(note, indent=1) + "\n")
    return note
