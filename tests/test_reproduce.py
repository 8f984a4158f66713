"""A recorded run is reproduced from its MLflow id alone: `python -m src.reproduce RUN_ID`."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
import yaml

from src.common.paths import ROOT
from src.configuration.composing import compose
from src.reproduce import code_difference
from tests.faults.commands import clone_of, flip_a_bit, output_of, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# A model that the user adds and does not commit: a file of code and one of configuration.
MODEL = '''
"""A narrow text classifier."""

from __future__ import annotations

from typing import Any

from src.configuration.schema import Optimizer, PositiveInt, Schedule
from src.models.lstm import TextClassifier


class Narrow(TextClassifier):
    def __init__(self, meta: Any, *, optimizer: Optimizer, schedule: Schedule, hidden: PositiveInt = 8) -> None:
        super().__init__(meta, optimizer=optimizer, schedule=schedule, hidden=hidden, embedding=12, pooling="mean")
'''
CONFIGURATION = {
    "_target_": "src.models.narrow.Narrow",
    "optimizer": {"name": "adamw", "lr": 0.003},
    "schedule": {"name": "constant"},
}
SMALL = (
    "data.loader.batch_size=20",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=5",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.threads=1",
    "export.latency_seconds=0.05",
)


@pytest.fixture(scope="module")
def recorded(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A clean repository, and the id of a run that was trained and exported there with uncommitted changes."""
    folder = clone_of(clone, tmp_path_factory.mktemp("reproduce") / "repository")
    (folder / "src" / "models" / "narrow.py").write_text(MODEL.lstrip())
    (folder / "conf" / "model" / "narrow.yaml").write_text(yaml.safe_dump(CONFIGURATION))
    tracked = folder / "src" / "models" / "lstm.py"  # the base of narrow.py
    tracked.write_text(tracked.read_text().replace("weight, std=embedding_std)", "weight, std=2 * embedding_std)"))
    stdout = run(folder, "python", "-m", "src.train", "+experiment=imdb_lstm", "model=narrow", *SMALL).stdout
    run(folder, "python", "-m", "src.sync")  # on a slow machine MLflow has not received everything yet
    for stage in ("evaluate", "export"):
        run(folder, "python", "-m", f"src.{stage}", "-cp", f"../{output_of(stdout)}", "-cn", "config")
        run(folder, "python", "-m", "src.sync")
    assert "lstm.py" in run(folder, "git", "status", "--porcelain").stdout
    run(folder, "git", "checkout", "--quiet", ".")
    run(folder, "git", "clean", "--quiet", "--force")
    assert run(folder, "git", "status", "--porcelain").stdout == ""
    (run_id,) = run_ids(folder)
    return folder, run_id


def run_ids(repository: Path) -> list[str]:
    """The runs in a repository's MLflow store."""
    with contextlib.closing(sqlite3.connect(repository / "experiments" / "mlflow.db")) as database:
        return [run_id for (run_id,) in database.execute("select run_uuid from runs")]


def reproduce(folder: Path, run_id: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "python", "-m", "src.reproduce", run_id, check=False)


def test_a_run_with_uncommitted_changes_is_reproduced_to_the_bit(
    recorded: tuple[Path, str],
) -> None:
    folder, run_id = recorded
    done = reproduce(folder, run_id)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (
        "note: today's code refuses the run's configuration (model._target_: 'src.models.narrow.Narrow'" in done.stdout
    )
    for result in (
        "weights (sha256)",
        "optimizer state (sha256)",
        "val_accuracy",
        "test_accuracy",
        "onnx_largest_difference",
    ):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{result} ")]
        assert line.endswith("  same")
    *_, verdict = done.stdout.splitlines()
    same, _, total, *_ = verdict.split()
    assert verdict == f"{total} of {total} are the same to the bit"
    assert int(same) > 8
    assert run(folder, "git", "status", "--porcelain").stdout == ""
    assert len(run(folder, "git", "worktree", "list").stdout.splitlines()) == 1
    assert run_ids(folder) == [run_id]  # the reproduced run is in the store of the worktree


def test_an_unknown_run_is_refused(recorded: tuple[Path, str]) -> None:
    folder, _ = recorded
    done = reproduce(folder, "0" * 32)
    assert done.returncode == 2
    assert f"refused: {'0' * 32}: " in done.stderr
    assert "`make ui` shows its id" in done.stderr
    assert "Traceback" not in done.stderr


def test_changed_packages_and_data_are_refused_together(
    recorded: tuple[Path, str],
) -> None:
    folder, run_id = recorded
    (split,) = folder.glob("data/direct/*/processed/sample/imdb/val.safetensors")
    lock = folder / "requirements.lock"
    content = split.read_bytes()
    flip_a_bit(split)
    with lock.open("a") as file:
        file.write("# another\n")
    try:
        done = reproduce(folder, run_id)
    finally:
        split.write_bytes(content)
        run(folder, "git", "checkout", "--quiet", lock.name)
    assert done.returncode == 2
    head, *reasons = done.stderr.strip().splitlines()
    assert head == f"refused: {run_id} can't be reproduced here:"
    assert [reason.split(" had sha256 ")[0].strip() for reason in reasons] == [
        "packages: requirements.lock",
        f"data: {split.relative_to(folder)}",
    ]
    assert "git checkout" in reasons[0]
    assert "make setup" in reasons[0]
    assert done.stdout == ""  # no training was started


def test_missing_data_is_refused_with_the_commands_that_provide_it(recorded: tuple[Path, str], tmp_path: Path) -> None:
    folder, run_id = recorded
    (split,) = folder.glob("data/direct/*/processed/sample/imdb/train.safetensors")
    moved = tmp_path / split.name
    shutil.move(split, moved)
    try:
        done = reproduce(folder, run_id)
    finally:
        shutil.move(moved, split)
    assert done.returncode == 2
    assert f"data: {split.relative_to(folder)} is missing: dvc pull, or dvc repro, or the run's command" in done.stderr


def test_the_modules_that_differ_from_the_run_s_are_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    config = compose(["experiment=imdb_lstm", "output=out"]).plain()
    assert code_difference(config, tmp_path) == "today's code for training is the run's"
    with (tmp_path / "src" / "models" / "lstm.py").open("a") as file:
        file.write("X = 1\n")
    assert code_difference(config, tmp_path).endswith("differs from the run's, which is used: src/models/lstm.py")
