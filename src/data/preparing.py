"""The data of a direct run: DVC's where it fits, otherwise the run's own, made on the spot."""

from __future__ import annotations

from typing import TypeVar

from filelock import FileLock

from src.common.identity import fingerprint
from src.common.paths import ROOT
from src.configuration.fingerprints import archive_fingerprint
from src.configuration.schema import DataConfig
from src.data import packed
from src.data.fetching.obtaining import obtain_archive
from src.data.packing import pack_splits
from src.data.raw import read_note, verified_archive

AnyConfig = TypeVar("AnyConfig", bound=DataConfig)
DIRECT = "data/direct"


def prepared(config: AnyConfig) -> AnyConfig:
    """The configuration with the folder of the data that it asks for.

    That is DVC's, if it was packed in this way from this archive. Otherwise the run's own, in data/direct/, which is
    made where it is missing: what DVC made is never overwritten by a direct run. One archive serves all packings of it.

    Raises:
        ConfigError: the profile has no source for this data set.
        SourceError: the archive can't be had, or does not hold what it should.
    """
    wanted_archive = archive_fingerprint(config)
    if _is_packed(config, wanted_archive):
        return config
    packing = fingerprint([config.packing, wanted_archive])[:8]
    own = config.model_copy(update={"data_folder": f"{DIRECT}/{packing}"})
    with locked(own.data_folder):
        if not _is_packed(own, wanted_archive):
            pack_splits(own, *verified_archive(_with_archive(config, wanted_archive)))
    return own


def _is_packed(config: DataConfig, wanted_archive: str) -> bool:
    """Whether the processed folder was packed in this way, from this archive."""
    if not (config.processed / "meta.json").is_file():
        return False
    meta = packed.read_meta(config.processed)
    return bool(meta["config"] == config.packing and meta["source"].get("fingerprint") == wanted_archive)


def _with_archive(config: AnyConfig, wanted_archive: str) -> AnyConfig:
    """The configuration with a raw folder that holds its archive: DVC's, or one in data/direct/ that is filled here."""
    if _has_archive(config, wanted_archive):
        return config
    folder = f"{DIRECT}/archives/{wanted_archive[:8]}"
    own = config.model_copy(update={"archive_folder": folder})
    with locked(folder):
        if not _has_archive(own, wanted_archive):
            obtain_archive(own)
    return own


def _has_archive(config: DataConfig, wanted_archive: str) -> bool:
    note = read_note(config)
    return note is not None and note.get("fingerprint") == wanted_archive


def locked(folder: str) -> FileLock:
    """A lock in a folder of the repository, which is made, against a second process that fills it."""
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    return FileLock(ROOT / folder / ".lock")
