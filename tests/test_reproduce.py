"""A recorded run made again from its MLflow id alone: `python -m src.reproduce RUN_ID`."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.faults.commands import clone_of, flip_a_bit, output_of, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# A model of the user's own, not committed: one file of code, one of configuration.
MODEL = '''
"""A classifier of texts that is narrow."""

from __future__ import annotations

from typing import Any

from src.configuration.schema import Optimizer, PositiveInt, Schedule
from src.models.lstm import TextClassifier


def narrow(meta: Any, *, optimizer: Optimizer, schedule: Schedule, hidden: PositiveInt = 8) -> TextClassifier:
    return TextClassifier(meta, optimizer=optimizer, schedule=schedule, hidden=hidden, embedding=12, pooling="mean")
'''
CONFIGURATION = {
    "_target_": "src.models.narrow.narrow",
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
    """A repository, clean again, and the id of a run that was trained and evaluated there while it was not."""
    folder = clone_of(clone, tmp_path_factory.mktemp("reproduce") / "repository")
    (folder / "src" / "models" / "narrow.py").write_text(MODEL.lstrip())
    (folder / "conf" / "model" / "narrow.yaml").write_text(yaml.safe_dump(CONFIGURATION))
    tracked = folder / "src" / "models" / "lstm.py"  # which narrow.py stands on
    tracked.write_text(tracked.read_text().replace("weight, std=embedding_std)", "weight, std=2 * embedding_std)"))
    said = run(folder, "python", "-m", "src.train", "+experiment=imdb_lstm", "model=narrow", *SMALL).stdout
    run(folder, "python", "-m", "src.evaluate", "-cp", f"../{output_of(said)}", "-cn", "config")
    run(folder, "python", "-m", "src.export", "-cp", f"../{output_of(said)}", "-cn", "config")
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


def test_a_run_of_a_dirty_tree_comes_out_the_same_to_the_bit_and_leaves_the_repository_alone(
    recorded: tuple[Path, str],
) -> None:
    folder, run_id = recorded
    done = reproduce(folder, run_id)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for fact in (
        "weights (sha256)",
        "optimizer state (sha256)",
        "val_accuracy",
        "test_accuracy",
        "onnx_largest_difference",
    ):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{fact} ")]
        assert line.endswith("  same")
    *_, verdict = done.stdout.splitlines()
    same, _, total, *_ = verdict.split()
    assert verdict == f"{total} of {total} are the same to the bit"
    assert int(same) > 8
    assert run(folder, "git", "status", "--porcelain").stdout == ""
    assert len(run(folder, "git", "worktree", "list").stdout.splitlines()) == 1
    assert run_ids(folder) == [run_id]  # the other one was in a store of its own


def test_an_unknown_run_is_refused(recorded: tuple[Path, str]) -> None:
    folder, _ = recorded
    done = reproduce(folder, "0" * 32)
    assert done.returncode == 2
    assert f"refused: {'0' * 32}: " in done.stderr
    assert "`make ui` shows its id" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_run_depended_on_and_is_another_now_is_refused_and_named_all_at_once(
    recorded: tuple[Path, str],
) -> None:
    folder, run_id = recorded
    (split,) = folder.glob("data/direct/*/processed/sample/imdb/val.safetensors")
    lock = folder / "requirements.lock"
    kept = split.read_bytes()
    flip_a_bit(split)
    with lock.open("a") as file:
        file.write("# another\n")
    try:
        done = reproduce(folder, run_id)
    finally:
        split.write_bytes(kept)
        run(folder, "git", "checkout", "--quiet", lock.name)
    assert done.returncode == 2
    head, *reasons = done.stderr.strip().splitlines()
    assert head == f"refused: {run_id} can't be made again here:"
    assert [reason.split(" had sha256 ")[0].strip() for reason in reasons] == [
        "packages: requirements.lock",
        f"data: {split.relative_to(folder)}",
    ]
    assert "git checkout" in reasons[0]
    assert "make setup" in reasons[0]
    assert done.stdout == ""  # nothing was begun


def test_data_that_is_not_there_is_named_with_the_way_to_have_it(recorded: tuple[Path, str], tmp_path: Path) -> None:
    folder, run_id = recorded
    (split,) = folder.glob("data/direct/*/processed/sample/imdb/train.safetensors")
    aside = tmp_path / split.name
    shutil.move(split, aside)
    try:
        done = reproduce(folder, run_id)
    finally:
        shutil.move(aside, split)
    assert done.returncode == 2
    assert (
        f"data: {split.relative_to(folder)} is not there: dvc pull, or dvc repro, or the run's command" in done.stderr
    )
