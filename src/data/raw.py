"""The raw folder of a data set: an archive, and a note of where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src.common.files import sha256_of
from src.configuration.schema import DataConfig
from src.data.fetching.files import SourceError

NOTE = "source.json"


def read_note(config: DataConfig) -> dict[str, Any] | None:
    """What `obtain_archive` noted; None where the raw folder has no note."""
    try:
        note: dict[str, Any] = json.loads((config.raw / NOTE).read_text())
    except (OSError, ValueError):
        return None
    return note


def verified_archive(config: DataConfig) -> tuple[Path, dict[str, Any]]:
    """The raw archive, after a check of its sha256, and its note.

    Raises:
        SourceError: the archive is missing, or changed since it was obtained.
    """
    note = read_note(config)
    if note is None:
        raise SourceError(f"{config.raw / NOTE} is missing: run `dvc repro`, or the download stage, first")
    archive = config.raw / note["archive"]
    if not archive.is_file() or sha256_of(archive) != note["sha256"]:
        raise SourceError(f"{archive} is missing or damaged: delete {config.raw} and run `dvc repro`")
    return archive, note
