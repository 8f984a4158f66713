"""Working checkpoints under what befalls them: kills at any moment, full disks, flipped bits, a second run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
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
    """The step of a whole checkpoint, all of it of one save."""
    loaded = IO.load_checkpoint(path)
    assert bool((loaded["weights"] == loaded["step"]).all())
    step: int = loaded["step"]
    return step


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Real processes that start in milliseconds: forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.training.checkpoints", "pytest"])
    return context


@pytest.fixture
def start(processes: ForkServerContext) -> Iterator[Callable[..., BaseProcess]]:
    """Starts a function in a process that does not outlive the test."""
    started: list[BaseProcess] = []

    def begin(function: Callable[..., None], *arguments: Any) -> BaseProcess:
        process = processes.Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_and_is_intact(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    content = checkpoint(3) | {"half": torch.randn(5, dtype=torch.bfloat16), "nested": {"state": [torch.arange(3)]}}
    IO.save_checkpoint(content, path)
    loaded = IO.load_checkpoint(path)
    assert is_intact(path)
    assert loaded.keys() == content.keys()
    assert torch.equal(loaded["half"], content["half"])
    assert torch.equal(loaded["nested"]["state"][0], torch.arange(3))
    assert (loaded["step"], loaded["rows"], loaded["none"]) == (3, content["rows"], None)


def test_a_save_replaces_the_one_before_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in range(3):
        IO.save_checkpoint(checkpoint(step), path)
        assert is_intact(path)
        assert step_of(path) == step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]
    IO.remove_checkpoint(path)
    assert not any(tmp_path.iterdir())


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    IO.save_checkpoint(checkpoint(0), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_intact(path)


def test_a_truncated_an_empty_and_an_unknown_checkpoint_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    assert not is_intact(path)
    IO.save_checkpoint(checkpoint(0), path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        assert not is_intact(path)
    path.write_bytes(whole)
    assert is_intact(path)
    digest_file(path).unlink()
    assert not is_intact(path)


# --- interrupted saves ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a SIGKILL at a chosen place: nothing catches it on the way."""


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_save_that_is_interrupted_between_its_files_again_and_again_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    path = tmp_path / "last.ckpt"
    IO.save_checkpoint(checkpoint(0), path)
    rename = os.replace
    for step in (1, 2, 3):
        left = iter(range(survived))

        def replace(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            with pytest.raises(Killed):
                IO.save_checkpoint(checkpoint(step), path)
        assert is_intact(path)
        assert step_of(path) == (step if survived == 2 else 0)
    IO.save_checkpoint(checkpoint(4), path)
    assert is_intact(path)
    assert len(digest_file(path).read_text().split()) == 1


def test_a_digest_that_cannot_be_written_is_named_itself_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    IO.save_checkpoint(checkpoint(0), path)
    digest_file(path).unlink()
    digest_file(path).mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        IO.save_checkpoint(checkpoint(1), path)
    assert refused.value.filename == str(digest_file(path))
    assert step_of(path) == 0


# --- the fingerprint --------------------------------------------------------------------------------------------------

CONFIG = ("experiment=imdb_lstm", "output=.")
DATA = {"train": {"sha256": "aa"}, "val": {"sha256": "bb"}}


def key_of(config: tuple[str, ...], data: dict[str, Any]) -> str:
    return fingerprint(identity(compose(list(config)), data))


def test_the_identity_is_stable_and_blind_to_the_order_of_keys() -> None:
    key = key_of(CONFIG, DATA)
    assert len(key) == 16
    assert key_of(CONFIG, dict(reversed(DATA.items()))) == key


@pytest.mark.parametrize(
    ("config", "data"),
    [
        pytest.param((*CONFIG, "seed=1"), DATA, id="seed"),
        pytest.param((*CONFIG, "model.optimizer.lr=0.5"), DATA, id="config"),
        pytest.param((*CONFIG, "data.loader.batch_size=7"), DATA, id="loader"),
        pytest.param(CONFIG, DATA | {"train": {"sha256": "ab"}}, id="data"),
    ],
)
def test_the_identity_changes_with_configuration_seed_and_data(config: tuple[str, ...], data: dict[str, Any]) -> None:
    assert key_of(config, data) != key_of(CONFIG, DATA)


def test_the_identity_names_the_code_that_trains_the_packages_and_the_threads() -> None:
    names = identity(compose(list(CONFIG)), DATA)
    assert {"src/models/lstm.py", "src/common/hardware.py", "package torch", "threads"} <= names.keys()
    assert names["package torch"] == torch.__version__.partition("+")[0]


def test_the_fingerprint_changes_with_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    before = key_of(CONFIG, DATA)
    try:
        torch.set_num_threads(threads + 1)
        assert key_of(CONFIG, DATA) != before
    finally:
        torch.set_num_threads(threads)


def test_the_differences_of_two_identities_are_named_with_their_values_and_digests_by_their_names_alone() -> None:
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


def hold(root: Path, held: Any) -> None:
    with WorkFolder("digits", {"seed": "0"}, root).locked():
        held.set()
        time.sleep(300)


def test_a_second_holder_is_refused_and_told_of_the_first_who_frees_the_folder_by_dying(
    tmp_path: Path, start: Callable[..., BaseProcess], processes: ForkServerContext
) -> None:
    held = processes.Event()
    first = start(hold, tmp_path, held)
    assert held.wait(60)
    wanted = rf"under way already, by process {first.pid} on {socket.gethostname()}: wait for it, or stop it"
    with pytest.raises(Failure, match=wanted), WorkFolder("digits", {"seed": "0"}, tmp_path).locked():
        pass
    with WorkFolder("digits", {"seed": "1"}, tmp_path).locked():
        pass
    first.kill()
    first.join()
    with WorkFolder("digits", {"seed": "0"}, tmp_path).locked() as work:
        assert (work.path / "holder").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_folder_is_free_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), WorkFolder("digits", {"seed": "0"}, tmp_path).locked():
        raise ZeroDivisionError
    with WorkFolder("digits", {"seed": "0"}, tmp_path).locked():
        pass


def test_a_whole_checkpoint_is_resumed_and_a_damaged_one_is_said_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = WorkFolder("digits", {"seed": "0"}, tmp_path)
    assert work.resumable() is None
    IO.save_checkpoint(checkpoint(0), work.last)
    assert work.resumable() == work.last
    assert capsys.readouterr().out == ""

    work.last.write_bytes(work.last.read_bytes()[:-1])
    assert work.resumable() is None
    said = f"{work.last} is damaged (its sha256 differs): not resumed, training starts anew\n"
    assert capsys.readouterr().out == said
    assert not work.last.exists()
    assert work.resumable() is None
    assert capsys.readouterr().out == ""


def test_an_unfinished_run_that_is_another_is_named_with_what_differs_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = WorkFolder("digits", {"model.lr": "0.1", "src/train.py": "aa"}, tmp_path)
    with unfinished.locked():
        IO.save_checkpoint(checkpoint(0), unfinished.last)
    other = WorkFolder("letters", {"model.lr": "0.1", "src/train.py": "aa"}, tmp_path / "elsewhere")
    same_place = WorkFolder("letters", {"model.lr": "0.2", "src/train.py": "aa"}, tmp_path)
    assert other.resumable() is None
    assert same_place.resumable() is None  # another experiment's: of no interest
    assert capsys.readouterr().out == ""

    changed = WorkFolder("digits", {"model.lr": "0.2", "src/train.py": "bb"}, tmp_path)
    with changed.locked():
        assert changed.resumable() is None
    said = capsys.readouterr().out
    assert f"in {unfinished.path} is not resumed, it is another: model.lr was 0.1, is 0.2; src/train.py. " in said
    assert is_intact(unfinished.last)

    with unfinished.locked():  # somebody works on it: not left over
        assert changed.resumable() is None
    assert capsys.readouterr().out == ""


def test_a_complete_run_leaves_its_journal_alone(tmp_path: Path) -> None:
    work = WorkFolder("digits", {"seed": "0"}, tmp_path)
    IO.save_checkpoint(checkpoint(0), work.last)
    IO.save_checkpoint(checkpoint(0), work.path / "best.ckpt")
    (work.path / ".last.ckpt.12345").write_bytes(b"what a killed save left behind")
    work.journal.write_text("{}\n")
    work.remove_checkpoints()
    assert [path.name for path in work.path.iterdir()] == ["tracking.jsonl"]
