"""What dvc.yaml tells DVC of a stage: the files and the keys that the stage reads, no fewer."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from src.common.paths import ROOT
from src.configuration.composing import check
from src.configuration.schema import Config, DataConfig, plain
from src.data import packed, preparing
from src.describe import describe
from src.evaluate import evaluate
from src.export import export
from src.tracking.tracker import Tracker
from src.train import train
from src.training import run
from tests.tiny_data import noise_digits

STAGES: dict[str, Callable[[Config], None]] = {"train": train, "evaluate": evaluate, "export": export}
# Where a run lies and how it is recorded; each name of an experiment and a data set has its own entry in dvc.yaml. What
# training begins with is a file that it depends on.
PLACES = {"output", "data_folder", "archive_folder", "weights_folder", "init_from", "tracking", "tags"}


class FilesRead:
    """The files that this process opens for reading and did not write, while `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self.read: set[str] = set()
        self.written: set[str] = set()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event == "open" and isinstance(arguments[0], str | Path):
            path, mode = str(arguments[0]), arguments[1]
            if isinstance(mode, str) and set(mode) & set("wax+"):
                self.written.add(path)
            elif path not in self.written and not os.path.isdir(path):  # a folder is opened to flush it
                self.read.add(path)


FILES = FilesRead()
sys.addaudithook(FILES)  # for the life of the process: a hook can't be removed


@contextlib.contextmanager
def files_read() -> Iterator[set[str]]:
    FILES.read, FILES.written, FILES.is_on = set(), set(), True
    try:
        yield FILES.read
    finally:
        FILES.is_on = False


KEYS: set[str] = set()


class Recording(Config):
    """A configuration that notes the sections that are read, but for tracking, and by `plain` for all at once."""

    def __getattribute__(self, name: str) -> Any:
        caller = sys._getframe(1)
        is_for_all = caller.f_code.co_name == "<dictcomp>" and caller.f_back and caller.f_back.f_code is plain.__code__
        if name in Config.model_fields and not is_for_all and "src.tracking" not in caller.f_globals["__name__"]:
            KEYS.add(name)
        return super().__getattribute__(name)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a small training on noise; nothing goes to MLflow."""
    tracker = MagicMock()
    monkeypatch.setattr(Tracker, "join", lambda *_: contextlib.nullcontext(tracker))
    monkeypatch.setattr(Tracker, "resume", lambda *_: contextlib.nullcontext(tracker))
    monkeypatch.setattr(preparing, "_is_packed", lambda *_: True)
    monkeypatch.setattr(run, "work_folder", partial(run.work_folder, root=tmp_path / "work"))
    return noise_digits(tmp_path, "trainer.max_epochs=1", "export.latency_seconds=0.001")


def stage_of(name: str) -> dict[str, Any]:
    """A stage of dvc.yaml."""
    stage: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]["do"]
    return stage


def test_every_file_that_a_stage_opens_is_a_dependency_in_dvc_yaml(config: Config, tmp_path: Path) -> None:
    for name, stage in STAGES.items():
        packed._read.cache_clear()  # or a file is opened by the first stage alone
        with files_read() as read:
            stage(config)
        dependencies = {
            dependency.replace("data/processed/${profile}/${item}", str(config.processed)).replace(
                "experiments/${key}", str(config.folder)
            )
            for dependency in stage_of(name)["deps"]
        }
        below = {path for path in read if path.startswith((str(config.processed), str(config.folder)))}
        own = {
            path
            for path in below
            if "/.export/" in path or "/.held" in path or f"{config.folder / name}/" in f"{path}/"
        }
        if name != "export":  # read with meta.json; only the model card makes something of it
            own.add(str(config.processed / "origin.json"))
        assert below - own - dependencies == set(), name


def test_every_section_that_a_stage_reads_is_a_parameter_in_dvc_yaml(config: Config) -> None:
    for name, stage in STAGES.items():
        recording = check(config.plain(), Recording)
        KEYS.clear()
        stage(recording)
        (parameters,) = (
            keys for entry in stage_of(name)["params"] for path, keys in entry.items() if path.endswith("config.yaml")
        )
        if name == "export":  # the model card shows the resolved configuration
            KEYS.update(Config.model_fields)
        named = {key.partition(".")[0] for key in parameters}
        assert KEYS - PLACES - named == set(), name


def test_the_data_report_reads_the_packed_data_and_the_profile(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataConfig, "report", property(lambda _: tmp_path / "report"))
    recording = check(config.plain(), Recording)
    KEYS.clear()
    with files_read() as read:
        describe(recording)
    assert stage_of("describe")["deps"] == ["data/processed/${profile}/${key}"]
    assert {Path(path).parent for path in read if path.startswith(str(tmp_path))} == {config.processed}
    (parameters,) = (
        keys for entry in stage_of("describe")["params"] for path, keys in entry.items() if "code" not in path
    )
    assert KEYS - PLACES - {"data"} == set(parameters)  # of data the name, which dvc.yaml's entry has
    stage = stage_of("describe")
    outputs = [*stage["outs"], *(path for entry in stage["metrics"] + stage["plots"] for path in entry)]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {Path(path).name for path in outputs}
