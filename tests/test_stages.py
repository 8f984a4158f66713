"""The download and preprocess stages, from the archive to packed splits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from src.common.errors import ConfigError
from src.common.files import sha256_of
from src.configuration.composing import compose
from src.configuration.fingerprints import archive_fingerprint
from src.configuration.schema import Config
from src.data import packed
from src.data.fetching import obtaining
from src.data.fetching.files import SourceError
from src.download import download
from src.preprocess import preprocess
from tests.loopback import Host
from tests.tiny_data import cifar_members, write_tar

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Composes configurations of the full profile with the data in the test's folder."""
    monkeypatch.setattr(obtaining, "ROOT", tmp_path)  # holds partial downloads
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def configure(*overrides: str) -> Config:
        base = ["experiment=cifar10_resnet", "output=out", f"data_folder={tmp_path / 'data'}", "profile=full"]
        return compose([*base, *overrides])

    return configure


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "mine.tar", cifar_members())


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def source_note(config: Config) -> dict[str, object]:
    return json.loads((config.raw / "source.json").read_text())


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


# --- download ---------------------------------------------------------------------------------------------------------


def test_the_sample_is_drawn_and_packed_offline(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure("profile=sample")
    download(config)
    source = source_note(config)
    assert (source["origin"], source["archive"]) == ("sample", "cifar-10-binary.tar.gz")
    assert source["sha256"] == sha256_of(config.raw / "cifar-10-binary.tar.gz")
    preprocess(config)
    meta = packed.read_meta(config.processed)
    assert meta["config"] == config.packing
    assert meta["source"] == source
    counts = {split: facts["examples"] for split, facts in meta["splits"].items()}
    assert counts.keys() == {"train", "val", "test"}
    assert f"cifar10: train {counts['train']}, val {counts['val']}, test {counts['test']}" in capsys.readouterr().out


def test_a_user_file_is_copied_and_its_folder_not_recorded(configure: Configure, archive: Path, tmp_path: Path) -> None:
    config = configure(f"data.archive={archive}")
    download(config)
    assert (config.raw / "cifar-10-binary.tar.gz").read_bytes() == archive.read_bytes()
    assert source_note(config) == {
        "origin": "mine.tar",
        "archive": "cifar-10-binary.tar.gz",
        "bytes": archive.stat().st_size,
        "sha256": sha256_of(archive),
        "fingerprint": archive_fingerprint(config),
    }
    preprocess(config)
    assert packed.read_meta(config.processed)["classes"] == ["cat", "ship"]


def test_a_user_folder_is_packed_like_an_archive(configure: Configure, tmp_path: Path) -> None:
    for name, content in cifar_members("mine").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    config = configure(f"data.archive={tmp_path / 'mine'}")
    download(config)
    first = source_note(config)
    preprocess(config)
    assert first["origin"] == "mine"
    assert len(packed.read_split(config.processed, "train")["labels"]) == 38  # one of each class is in val
    shutil.rmtree(config.raw)
    download(config)
    assert source_note(config) == first  # reproducible


def test_a_user_address_is_fetched(configure: Configure, archive: Path, host: Host) -> None:
    url = host.serve("/files/c.tar", archive.read_bytes())
    config = configure(f"data.archive={url}", f"data.sha256={sha256_of(archive)}")
    download(config)
    assert (source_note(config)["origin"], source_note(config)["sha256"]) == ("c.tar", sha256_of(archive))
    assert [request.path for request in host.requests] == ["/files/c.tar"]


def test_the_official_archive_is_fetched_from_the_second_mirror(
    configure: Configure, archive: Path, host: Host
) -> None:
    mirrors = [f"{host.url}/gone.tar", host.serve("/c.tar", archive.read_bytes())]
    config = configure(f"data.official={{urls: [{','.join(mirrors)}], sha256: {sha256_of(archive)}}}")
    download(config)
    assert source_note(config)["origin"] == mirrors[0]
    assert sha256_of(config.raw / "cifar-10-binary.tar.gz") == sha256_of(archive)


@pytest.mark.parametrize("kind", ["file", "address", "official"])
def test_a_wrong_sha256_is_refused_and_leaves_no_archive(
    kind: str, configure: Configure, archive: Path, host: Host
) -> None:
    wrong = hashlib.sha256(b"something else").hexdigest()
    url = host.serve("/c.tar", archive.read_bytes())
    overrides = {
        "file": [f"data.archive={archive}", f"data.sha256={wrong}"],
        "address": [f"data.archive={url}", f"data.sha256={wrong}"],
        "official": [f"data.official={{urls: [{url}], sha256: {wrong}}}"],
    }[kind]
    config = configure(*overrides)
    with pytest.raises(SourceError) as error:
        download(config)
    assert wrong in str(error.value)
    assert sha256_of(archive) in str(error.value)
    assert files_in(config.raw) == []
    with pytest.raises(SourceError, match=r"source\.json is missing: run `dvc repro`"):
        preprocess(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["profile=sample", "data.archive=mine.tar"],
            "data.archive: given, but profile=sample draws its own data; add profile=full",
        ),
        (
            ["profile=sample", "data._target_=src.data.sets.image_folder.ImageFolders"],
            "profile: cifar10 has no embedded sample; add profile=full",
        ),
        (
            ["data.official=null"],
            "data.archive: not given, and cifar10 has no official source; add data.archive=PATH_OR_URL",
        ),
    ],
)
def test_a_profile_without_a_source_is_refused_with_the_remedy(
    overrides: list[str], message: str, configure: Configure
) -> None:
    config = configure(*overrides)
    with pytest.raises(ConfigError) as error:
        download(config)
    assert str(error.value) == message
    assert files_in(config.raw) == []


# --- preprocess -------------------------------------------------------------------------------------------------------


def test_a_missing_raw_archive_is_refused(configure: Configure, archive: Path) -> None:
    config = configure(f"data.archive={archive}")
    download(config)
    (config.raw / "cifar-10-binary.tar.gz").unlink()
    with pytest.raises(
        SourceError, match=r"cifar-10-binary\.tar\.gz is missing or damaged: delete .* and run `dvc repro`"
    ):
        preprocess(config)
    assert not config.processed.exists()


def test_packing_is_reproducible(configure: Configure, archive: Path) -> None:
    config = configure(f"data.archive={archive}")
    download(config)
    preprocess(config)
    first = {path.name: sha256_of(path) for path in config.processed.iterdir()}
    shutil.rmtree(config.processed)
    preprocess(config)
    assert {path.name: sha256_of(path) for path in config.processed.iterdir()} == first


def test_duplicates_between_splits_are_printed(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = cifar_members()
    members["cifar-10-batches-bin/test_batch.bin"] = members["cifar-10-batches-bin/data_batch_1.bin"]
    config = configure(f"data.archive={write_tar(tmp_path / 'c.tar', members)}", "data.val_fraction=0.01")
    download(config)
    preprocess(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if "duplicates between" in line]
    assert sum(int(line.split()[1]) for line in lines) == 20
    assert lines[0].startswith("cifar10: ")
