"""Working checkpoints: interrupted saves, the identity of a run, the lock and the resume of its folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from src.common.errors import Failure
from src.common.identity import differences, fingerprint
from src.configuration.composing import compose
from src.training.checkpoints import AtomicCheckpointIO, WorkFolder, digest_file, identity, is_intact

IO = AtomicCheckpointIO()


def checkpoint(step: int, size: int = 20_000) -> dict[str, Any]:
    return {
        "step": step,
        "weights": torch.full((size,), float(step)),
        "rows": [{"epoch": 1, "loss": 0.5}],
        "none": None,
    }


def step_of(path: Path) -> int:
    """The step of a checkpoint, all of whose content is of one save."""
    loaded = IO.load_checkpoint(path)
    assert bool((loaded["weights"] == loaded["step"]).all())
    step: int = loaded["step"]
    return step


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    content = checkpoint(3) | {"half": torch.randn(5, dtype=torch.bfloat16), "nested": {"state": [torch.arange(3)]}}
    IO.save_checkpoint(content, path)
    loaded = IO.load_checkpoint(path)
    assert is_intact(path)
    assert loaded.keys() == content.keys()
    assert torch.equal(loaded["half"], content["half"])
    assert torch.equal(loaded["nested"]["state"][0], torch.arange(3))
    assert (loaded["step"], loaded["rows"], loaded["none"]) == (3, content["rows"], None)


def test_a_save_replaces_the_previous_one_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in range(3):
        IO.save_checkpoint(checkpoint(step), path)
        assert is_intact(path)
        assert step_of(path) == step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]
    IO.remove_checkpoint(path)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_without_its_digest_is_not_intact(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    assert not is_intact(path)
    IO.save_checkpoint(checkpoint(0), path)
    assert is_intact(path)
    digest_file(path).unlink()
    assert not is_intact(path)


# --- interrupted saves ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a SIGKILL at a chosen call: a BaseException that no handler catches."""


@pytest.mark.parametrize("renames", [0, 1, 2])  # that succeed before the kill
def test_repeatedly_interrupted_saves_leave_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    path = tmp_path / "last.ckpt"
    IO.save_checkpoint(checkpoint(0), path)
    rename = os.replace
    for step in (1, 2, 3):
        remaining = iter(range(renames))

        def replace(source: Path, target: Path, remaining: Iterator[int] = remaining) -> None:
            if next(remaining, None) is None:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            with pytest.raises(Killed):
                IO.save_checkpoint(checkpoint(step), path)
        assert is_intact(path)
        assert step_of(path) == (step if renames == 2 else 0)
    IO.save_checkpoint(checkpoint(4), path)
    assert is_intact(path)
    assert len(digest_file(path).read_text().split()) == 1


def test_an_unwritable_digest_is_named_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    IO.save_checkpoint(checkpoint(0), path)
    digest_file(path).unlink()
    digest_file(path).mkdir()
    with pytest.raises(IsADirectoryError) as error:
        IO.save_checkpoint(checkpoint(1), path)
    assert error.value.filename == str(digest_file(path))
    assert step_of(path) == 0


# --- the identity of a run --------------------------------------------------------------------------------------------

CONFIG = ("experiment=imdb_lstm", "output=.")
DATA = {"train": {"sha256": "aa"}, "val": {"sha256": "bb"}}


def fingerprint_of(overrides: tuple[str, ...], data: dict[str, Any], weights: dict[str, str] | None = None) -> str:
    return fingerprint(identity(compose(list(overrides)), data, weights or {}))


def test_the_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    key = fingerprint_of(CONFIG, DATA)
    assert len(key) == 16
    assert fingerprint_of(CONFIG, dict(reversed(DATA.items()))) == key


@pytest.mark.parametrize(
    ("overrides", "data"),
    [
        pytest.param((*CONFIG, "seed=1"), DATA, id="seed"),
        pytest.param((*CONFIG, "model.optimizer.lr=0.5"), DATA, id="config"),
        pytest.param((*CONFIG, "data.loader.batch_size=7"), DATA, id="loader"),
        pytest.param(CONFIG, DATA | {"train": {"sha256": "ab"}}, id="data"),
    ],
)
def test_the_fingerprint_changes_with_configuration_seed_and_data(
    overrides: tuple[str, ...], data: dict[str, Any]
) -> None:
    assert fingerprint_of(overrides, data) != fingerprint_of(CONFIG, DATA)


def test_the_fingerprint_changes_with_the_weights_that_training_begins_with() -> None:
    keys = {fingerprint_of(CONFIG, DATA, weights) for weights in ({}, {"pretrained": "aa"}, {"pretrained": "ab"})}
    assert len(keys) == 3


def test_the_identity_names_code_packages_and_threads() -> None:
    names = identity(compose(list(CONFIG)), DATA, {})
    assert {"src/models/lstm.py", "src/common/hardware.py", "package torch", "threads"} <= names.keys()
    assert names["package torch"] == torch.__version__.partition("+")[0]


def test_the_fingerprint_changes_with_the_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that `auto` began on a GPU is not resumed on another, nor on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    keys = set()
    for name, cudnn in (("NVIDIA A100", 92000), ("NVIDIA H100", 92000), ("NVIDIA H100", 91300)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda cudnn=cudnn: cudnn)
        keys |= {fingerprint_of((*CONFIG, f"trainer.accelerator={device}"), DATA) for device in ("auto", "cpu")}
    assert len(keys) == 4


def test_the_fingerprint_changes_with_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    before = fingerprint_of(CONFIG, DATA)
    try:
        torch.set_num_threads(threads + 1)
        assert fingerprint_of(CONFIG, DATA) != before
    finally:
        torch.set_num_threads(threads)


def test_differences_are_named_with_values_and_digests_without() -> None:
    old = {"seed": "0", "model.lr": "0.1", "src/train.py": "aa", "data.train.sha256": '"aa"', "gone": "1"}
    new = {"seed": "0", "model.lr": "0.2", "src/train.py": "bb", "data.train.sha256": '"bb"', "new": "2"}
    assert differences(old, new) == [
        "data.train.sha256",
        "gone was 1, is not there",
        "model.lr was 0.1, is 0.2",
        "new was not there, is 2",
        "src/train.py",
    ]
    assert differences(old, dict(reversed(old.items()))) == []


# --- the work folder --------------------------------------------------------------------------------------------------


def test_a_locked_folder_names_its_holder_and_is_free_after_a_failure(tmp_path: Path) -> None:
    work = WorkFolder("digits", {"seed": "0"}, tmp_path)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(ZeroDivisionError), work.locked():
        with (
            pytest.raises(Failure, match=f"under way already, by {holder}: wait for it, or stop it"),
            WorkFolder("digits", {"seed": "0"}, tmp_path).locked(),
        ):
            pass
        with WorkFolder("digits", {"seed": "1"}, tmp_path).locked():
            raise ZeroDivisionError
    assert not work.path.joinpath("lock").exists() and not work.path.joinpath("holder").exists()
    with work.locked():
        pass


def test_another_unfinished_run_is_named_with_its_differences_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = WorkFolder("digits", {"model.lr": "0.1", "src/train.py": "aa"}, tmp_path)
    with unfinished.locked():
        IO.save_checkpoint(checkpoint(0), unfinished.last)
    other = WorkFolder("letters", {"model.lr": "0.1", "src/train.py": "aa"}, tmp_path / "elsewhere")
    same_place = WorkFolder("letters", {"model.lr": "0.2", "src/train.py": "aa"}, tmp_path)
    assert other.resumable() is None
    assert same_place.resumable() is None  # of another experiment: not reported
    assert capsys.readouterr().out == ""

    changed = WorkFolder("digits", {"model.lr": "0.2", "src/train.py": "bb"}, tmp_path)
    with changed.locked():
        assert changed.resumable() is None
    message = capsys.readouterr().out
    assert f"in {unfinished.path} is not resumed, it is another: model.lr was 0.1, is 0.2; src/train.py. " in message
    assert is_intact(unfinished.last)

    with unfinished.locked():  # under way: not reported
        assert changed.resumable() is None
    assert capsys.readouterr().out == ""


def test_removing_the_checkpoints_of_a_complete_run_keeps_its_journal(tmp_path: Path) -> None:
    work = WorkFolder("digits", {"seed": "0"}, tmp_path)
    IO.save_checkpoint(checkpoint(0), work.last)
    IO.save_checkpoint(checkpoint(0), work.path / "best.ckpt")
    (work.path / ".last.ckpt.12345").write_bytes(b"half a checkpoint")
    work.journal.write_text("{}\n")
    work.remove_checkpoints()
    assert [path.name for path in work.path.iterdir()] == ["tracking.jsonl"]
