"""Killed, concurrent and failing processes under DVC: what it records, what remains, how the run is resumed."""

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
    is_running,
    run,
    started,
)
from verification.interruption import digests, wait_for_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

NAME, DATA = "mnist_mlp", "mnist"
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
    "model.network.hidden": [8],
    "export.latency_seconds": 0.05,
}
REPRO_TRAIN = ("dvc", "repro", f"train@{NAME}")
REPRO = ("dvc", "repro", f"export@{NAME}")  # train, evaluate, export
BY_HAND = ("python", "-m", "src.train", "-cp", f"../{FOLDER}", "-cn", "config")


@pytest.fixture(scope="module")
def original(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose small training ran: the previous model."""
    folder = clone_of(clone, tmp_path_factory.mktemp("processes") / "original")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params |= {"run": {NAME: DATA}, "data": {DATA: {}}, "experiments": {NAME: {"overrides": {}}}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    override(folder, SMALL)
    run(folder, *REPRO_TRAIN)
    return folder


@pytest.fixture
def repository(original: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return copy(original, tmp_path / "repository")


@pytest.fixture(scope="module")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose small pipeline ran to its end and was committed."""
    folder = copy(original, tmp_path_factory.mktemp("exported") / "repository")
    run(folder, *REPRO)
    run(folder, "git", "add", "--all")
    run(folder, "git", "-c", "user.name=test", "-c", "user.email=test@example.invalid", "commit", "-qm", "ran")
    return folder


@pytest.fixture
def complete_repository(exported: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return copy(exported, tmp_path / "repository")


@pytest.fixture(scope="module")
def uninterrupted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of an uninterrupted training with seed 7, without DVC."""
    folder = copy(original, tmp_path_factory.mktemp("uninterrupted") / "repository")
    for path in (folder / FOLDER / "train").iterdir():
        if path.name != ".gitignore":  # DVC's, for the files that it tracks
            path.unlink()
    run(folder, *BY_HAND, "seed=7")
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
    """The entries of the training, evaluation and export in dvc.lock, as far as they ran."""
    stages = yaml.safe_load((repository / "dvc.lock").read_text())["stages"]
    names = [f"{stage}@{NAME}" for stage in ("train", "evaluate", "export")]
    return {name: stages[name] for name in names if name in stages}


def outputs(repository: Path) -> dict[str, dict[str, str]]:
    """The digests of the trained and of the exported files."""
    return {folder: digests(repository / FOLDER / folder) for folder in ("train", "export")}


def assert_resumes(repository: Path, uninterrupted: dict[str, str]) -> None:
    """Asserts that the next `dvc repro` resumes the training with seed 7, to the bits of an uninterrupted one."""
    done = run(repository, *REPRO_TRAIN)
    assert "goes on with the run that was interrupted" in done.stdout
    assert digests(repository / FOLDER / "train") == uninterrupted
    assert run(repository, "dvc", "status", f"train@{NAME}").stdout.strip() == "Data and pipelines are up to date."


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["SIGTERM to the trainer", "Ctrl-C in the terminal"])
@pytest.mark.long
def test_a_stopped_training_is_not_recorded_and_the_next_repro_resumes_it(
    stop: str, repository: Path, uninterrupted: dict[str, str]
) -> None:
    lock, files = recorded(repository), outputs(repository)
    override(repository, {"seed": 7})
    with started(repository, *REPRO_TRAIN) as dvc:
        trainer = holder(wait_for_checkpoint(repository, dvc))
        if stop == "SIGTERM to the trainer":
            os.kill(trainer, signal.SIGTERM)
        else:
            os.killpg(dvc.pid, signal.SIGINT)  # a terminal signals the process group
        output, _ = dvc.communicate(timeout=60)
    assert dvc.returncode != 0
    assert "saving, then ending" in output
    assert f"ERROR: failed to reproduce 'train@{NAME}': failed to run: python -m src.train" in output
    assert f"exited with {143 if 'TERM' in stop else 130}" in output
    assert "Traceback" not in output
    assert recorded(repository) == lock
    assert outputs(repository) == files
    assert_resumes(repository, uninterrupted)


def test_a_killed_dvc_stops_its_trainer_and_the_next_repro_resumes_it(
    repository: Path, uninterrupted: dict[str, str]
) -> None:
    lock, files = recorded(repository), outputs(repository)
    override(repository, {"seed": 7})
    with started(repository, *REPRO_TRAIN) as dvc:
        trainer = holder(wait_for_checkpoint(repository, dvc))
        dvc.kill()
        output, _ = dvc.communicate(timeout=60)  # up to the end of the trainer
    assert "SIGTERM: saving, then ending" in output
    assert "trained in" not in output
    assert not is_running(trainer)
    assert recorded(repository) == lock
    assert outputs(repository) == files
    assert_resumes(repository, uninterrupted)


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A repository with a running `dvc repro`, longer than the tests, and its process."""
    folder = copy(original, tmp_path_factory.mktemp("running") / "repository")
    override(folder, {"trainer.max_epochs": 1000})
    with started(folder, *REPRO_TRAIN) as dvc:
        wait_for_checkpoint(folder, dvc)
        yield folder, dvc


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (REPRO_TRAIN, "is busy, it is being blocked by:\n  (PID {dvc}): "),
        (BY_HAND, "train failed: this very run is under way already, by process {trainer} on "),
        (
            (*BY_HAND, "seed=9"),
            "train failed: another run into experiments/mnist_mlp is under way already, by process ",
        ),
    ],
    ids=["a second repro", "the same run by hand", "another run into its folder"],
)
def test_a_second_process_is_refused_and_the_first_one_named(
    second: tuple[str, ...], message: str, running: tuple[Path, subprocess.Popen[str]]
) -> None:
    repository, dvc = running
    trainer = holder(wait_for_checkpoint(repository, dvc))
    start_time = time.monotonic()
    done = run(repository, *second, check=False)
    assert time.monotonic() - start_time < 30  # most of it imports
    assert done.returncode != 0
    assert message.format(dvc=dvc.pid, trainer=trainer) in done.stderr
    assert "Traceback" not in done.stderr
    wait_for_checkpoint(repository, dvc)  # the first process continues
    assert "model.safetensors" not in digests(repository / FOLDER / "train")  # no other process wrote it


# --- a stage that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "stage", "message"),
    [
        (
            {"model.optimizer.lr": 1e38, "trainer.gradient_clip": None},
            "train",
            "train failed: a weight or the optimizer's state became NaN or infinite in epoch 1: lower ",
        ),
        ({"export.tolerance": 1e-30}, "export", "export failed: .*answers differ from PyTorch's by up to"),
    ],
    ids=["weight not finite", "export not exact"],
)
@pytest.mark.long
def test_a_failed_stage_keeps_the_previous_model_and_export(
    values: dict[str, Any], stage: str, message: str, complete_repository: Path
) -> None:
    lock, files = recorded(complete_repository), outputs(complete_repository)
    override(complete_repository, values)
    done = run(complete_repository, *REPRO, check=False)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith(message.partition(".*")[0])], done.stderr
    assert message.rpartition(".*")[2] in done.stderr
    assert f"ERROR: failed to reproduce '{stage}@{NAME}'" in done.stderr
    assert "Traceback" not in done.stderr
    assert recorded(complete_repository) == lock
    assert outputs(complete_repository) == files
    run(complete_repository, "git", "checkout", "--quiet", "params.yaml")
    assert not re.search(r"Running stage '(train|evaluate|export)@", run(complete_repository, *REPRO).stdout)
    assert outputs(complete_repository) == files
    assert run(complete_repository, "git", "status", "--porcelain").stdout == ""


# --- a damaged dvc.lock -----------------------------------------------------------------------------------------------


def truncated_in_a_key(lock: str) -> str:
    return lock[: lock.rindex("md5:") + 2]


def with_conflict_markers(lock: str) -> str:
    """The lock after a merge of two branches that trained: both digests of an output."""
    lines = lock.splitlines()
    index = next(number for number, line in enumerate(lines) if line.lstrip().startswith("md5:"))
    other = lines[index].replace("md5: ", "md5: 0")[: len(lines[index])]
    lines[index : index + 1] = ["<<<<<<< HEAD", lines[index], "=======", other, ">>>>>>> other"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated_in_a_key, "'./dvc.lock' is invalid"),
        (with_conflict_markers, "'./dvc.lock' is invalid (possible merge conflicts)"),
    ],
    ids=["truncated", "with conflict markers"],
)
@pytest.mark.long
def test_a_damaged_lock_is_named_and_no_stage_runs_after_git_restores_it(
    damage: Any, message: str, complete_repository: Path
) -> None:
    lock = complete_repository / "dvc.lock"
    lock.write_text(damage(lock.read_text()))
    done = run(complete_repository, *REPRO, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    run(complete_repository, "git", "checkout", "--quiet", "dvc.lock")
    assert "Data and pipelines are up to date." in run(complete_repository, *REPRO).stdout
    assert run(complete_repository, "git", "status", "--porcelain").stdout == ""


@pytest.mark.long
def test_a_lock_truncated_between_stages_is_rebuilt_without_training(complete_repository: Path) -> None:
    lock, files = complete_repository / "dvc.lock", outputs(complete_repository)
    complete = recorded(complete_repository)
    lock.write_text(lock.read_text().partition(f"  export@{NAME}:")[0])
    done = run(complete_repository, *REPRO)
    assert "Running stage" not in done.stdout
    assert recorded(complete_repository) == complete
    assert outputs(complete_repository) == files
