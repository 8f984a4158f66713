"""Processes that end too soon, come twice or fail, inside DVC: what it records, what stays, how it goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.commands import (
    clone_of,
    copy,
    holder,
    lives,
    run,
    started,
)
from verification.interruption import digests, wait_for_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

NAME = "imdb_lstm"
FOLDER = Path("experiments", NAME)
# A training of some seconds, with a checkpoint after each batch.
SMALL = {
    "seed": 0,
    "trainer.max_epochs": 3,
    "trainer.limit_train_batches": 60,
    "trainer.limit_val_batches": 2,
    "trainer.limit_test_batches": 2,
    "trainer.threads": 1,
    "trainer.checkpoint_seconds": 0,
    "data.loader.batch_size": 20,
    "model.hidden": 8,
    "model.embedding": 8,
    "export.latency_seconds": 0.05,
}
REPRO_TRAIN = ("dvc", "repro", f"train@{NAME}")
REPRO = ("dvc", "repro", f"export@{NAME}")  # train, evaluate, export
BY_HAND = ("python", "-m", "src.train", "-cp", f"../{FOLDER}", "-cn", "config")


@pytest.fixture(scope="module")
def original(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose small pipeline ran and was committed: the last good model and export."""
    folder = clone_of(clone, tmp_path_factory.mktemp("processes") / "original")
    override(folder, SMALL)
    run(folder, *REPRO)
    run(folder, "git", "-c", "user.name=test", "-c", "user.email=test@example.invalid", "commit", "-qam", "ran")
    return folder


@pytest.fixture
def repository(original: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return copy(original, tmp_path / "repository")


@pytest.fixture(scope="module")
def undisturbed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the training with seed 7 writes if nothing happens to it."""
    folder = copy(original, tmp_path_factory.mktemp("undisturbed") / "repository")
    override(folder, {"seed": 7})
    run(folder, *REPRO_TRAIN)
    return digests(folder / FOLDER / "train")


def override(repository: Path, values: dict[str, Any]) -> None:
    """Writes overrides of the experiment into params.yaml."""
    path = repository / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for key, value in values.items():
        section = params["experiments"][NAME]["overrides"]
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path.write_text(yaml.safe_dump(params))


def recorded(repository: Path) -> dict[str, Any]:
    """What dvc.lock says of the training and what follows from it."""
    stages = yaml.safe_load((repository / "dvc.lock").read_text())["stages"]
    return {stage: stages[f"{stage}@{NAME}"] for stage in ("train", "evaluate", "export")}


def good(repository: Path) -> dict[str, dict[str, str]]:
    """The digests of what training and export left."""
    return {folder: digests(repository / FOLDER / folder) for folder in ("train", "export")}


def goes_on(repository: Path, undisturbed: dict[str, str]) -> None:
    """The next `dvc repro` resumes the training with seed 7, to the same bits as if nothing had happened."""
    done = run(repository, *REPRO_TRAIN)
    assert "goes on with the run that was interrupted" in done.stdout
    assert digests(repository / FOLDER / "train") == undisturbed
    assert run(repository, "dvc", "status", f"train@{NAME}").stdout.strip() == "Data and pipelines are up to date."


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["SIGTERM to the trainer", "Ctrl-C in the terminal"])
@pytest.mark.long
def test_a_trainer_that_is_told_to_end_is_not_recorded_and_the_next_repro_goes_on(
    sent: str, repository: Path, undisturbed: dict[str, str]
) -> None:
    lock, files = recorded(repository), good(repository)
    override(repository, {"seed": 7})
    with started(repository, *REPRO_TRAIN) as dvc:
        trainer = holder(wait_for_checkpoint(repository, dvc))
        if sent == "SIGTERM to the trainer":
            os.kill(trainer, signal.SIGTERM)
        else:
            os.killpg(dvc.pid, signal.SIGINT)  # a terminal sends it to all
        said, _ = dvc.communicate(timeout=60)
    assert dvc.returncode != 0
    assert "saving, then ending" in said
    assert f"ERROR: failed to reproduce 'train@{NAME}': failed to run: python -m src.train" in said
    assert f"exited with {143 if 'TERM' in sent else 130}" in said
    assert "Traceback" not in said
    assert recorded(repository) == lock
    assert good(repository) == files
    goes_on(repository, undisturbed)


def test_a_killed_dvc_leaves_no_trainer_behind_and_the_next_repro_goes_on(
    repository: Path, undisturbed: dict[str, str]
) -> None:
    lock, files = recorded(repository), good(repository)
    override(repository, {"seed": 7})
    with started(repository, *REPRO_TRAIN) as dvc:
        trainer = holder(wait_for_checkpoint(repository, dvc))
        dvc.kill()
        said, _ = dvc.communicate(timeout=60)  # what the trainer still says, to its end
    assert "SIGTERM: saving, then ending" in said
    assert "trained in" not in said
    assert not lives(trainer)
    assert recorded(repository) == lock
    assert good(repository) == files
    goes_on(repository, undisturbed)


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def under_way(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A repository in which a `dvc repro` trains for longer than the tests take, and that process."""
    folder = copy(original, tmp_path_factory.mktemp("under-way") / "repository")
    override(folder, {"trainer.max_epochs": 1000})
    with started(folder, *REPRO_TRAIN) as dvc:
        wait_for_checkpoint(folder, dvc)
        yield folder, dvc


@pytest.mark.parametrize(
    ("second", "refused"),
    [
        (REPRO_TRAIN, "is busy, it is being blocked by:\n  (PID {dvc}): "),
        (BY_HAND, "train failed: this very run is under way already, by process {trainer} on "),
        (
            (*BY_HAND, "seed=9"),
            "train failed: another run into experiments/imdb_lstm is under way already, by process ",
        ),
    ],
    ids=["a second repro", "the same run by hand", "another run into its folder"],
)
def test_a_second_process_is_refused_at_once_and_told_who_is_at_it(
    second: tuple[str, ...], refused: str, under_way: tuple[Path, subprocess.Popen[str]]
) -> None:
    repository, dvc = under_way
    trainer = holder(wait_for_checkpoint(repository, dvc))
    started_at = time.monotonic()
    done = run(repository, *second, check=False)
    assert time.monotonic() - started_at < 30  # most of it imports
    assert done.returncode != 0
    assert refused.format(dvc=dvc.pid, trainer=trainer) in done.stderr
    assert "Traceback" not in done.stderr
    wait_for_checkpoint(repository, dvc)  # the first one goes on
    assert "model.safetensors" not in digests(repository / FOLDER / "train")  # and nobody else wrote there


# --- a stage that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "stage", "told"),
    [
        (
            {"model.optimizer.lr": 1e38, "trainer.gradient_clip": None},
            "train",
            "train failed: the loss became NaN or infinite in epoch 1: lower model.optimizer.lr",
        ),
        ({"export.tolerance": 1e-30}, "export", "export failed: .*answers differ from PyTorch's by up to"),
    ],
    ids=["a loss that is no number", "an export that is not exact enough"],
)
@pytest.mark.long
def test_a_stage_that_fails_leaves_the_last_good_model_and_export(
    values: dict[str, Any], stage: str, told: str, repository: Path
) -> None:
    lock, files = recorded(repository), good(repository)
    override(repository, values)
    done = run(repository, *REPRO, check=False)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith(told.partition(".*")[0])]
    assert told.rpartition(".*")[2] in done.stderr
    assert f"ERROR: failed to reproduce '{stage}@{NAME}'" in done.stderr
    assert "Traceback" not in done.stderr
    assert recorded(repository) == lock
    assert good(repository) == files
    run(repository, "git", "checkout", "--quiet", "params.yaml")
    assert not re.search(r"Running stage '(train|evaluate|export)@", run(repository, *REPRO).stdout)
    assert good(repository) == files
    assert run(repository, "git", "status", "--porcelain").stdout == ""


# --- a damaged dvc.lock -----------------------------------------------------------------------------------------------


def cut_within_a_key(lock: str) -> str:
    return lock[: lock.rindex("md5:") + 2]


def with_conflict_markers(lock: str) -> str:
    """Two branches trained: git leaves both of the outputs' digests."""
    lines = lock.splitlines()
    place = next(number for number, line in enumerate(lines) if line.lstrip().startswith("md5:"))
    other = lines[place].replace("md5: ", "md5: 0")[: len(lines[place])]
    lines[place : place + 1] = ["<<<<<<< HEAD", lines[place], "=======", other, ">>>>>>> other"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_within_a_key, "'./dvc.lock' is invalid"),
        (with_conflict_markers, "'./dvc.lock' is invalid (possible merge conflicts)"),
    ],
    ids=["truncated", "with conflict markers"],
)
@pytest.mark.long
def test_a_damaged_lock_is_named_and_once_git_has_restored_it_nothing_runs_again(
    damage: Any, told: str, repository: Path
) -> None:
    lock = repository / "dvc.lock"
    lock.write_text(damage(lock.read_text()))
    done = run(repository, *REPRO, check=False)
    assert done.returncode != 0
    assert told in done.stderr
    run(repository, "git", "checkout", "--quiet", "dvc.lock")
    assert "Data and pipelines are up to date." in run(repository, *REPRO).stdout
    assert run(repository, "git", "status", "--porcelain").stdout == ""


@pytest.mark.long
def test_a_lock_that_was_cut_between_stages_is_made_again_without_a_training(repository: Path) -> None:
    lock, files = repository / "dvc.lock", good(repository)
    whole = recorded(repository)
    lock.write_text(lock.read_text().partition("  export@")[0])
    done = run(repository, *REPRO)
    assert "Running stage" not in done.stdout
    assert recorded(repository) == whole
    assert good(repository) == files
