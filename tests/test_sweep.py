"""Sweeps as real commands: killed, extended, with trials that fail, on several workers; and their results."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import processes
from tests.conftest import Run, edited
from tests.processes import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CIFAR = (
    "+experiment=cifar10_resnet",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
    "data.loader.eval_batch_size=100",
    "model.network.width=8",
    "trainer.threads=1",
    "trainer.max_epochs=3",
    "sweep.space={model.optimizer.lr: {float: [0.03, 0.4], log: true}, model.label_smoothing: {float: [0, 0.3]}, "
    "model.schedule: {choice: {linear: {name: linear}, cosine: {name: cosine}}}, "
    "model.schedule.hold: {float: [0, 0.5], when: {model.schedule: linear}}}",
)
SWEEP = ("python", "-m", "src.sweep")
TRIALS = 13  # beyond the ten that TPE draws at random


def start(clone: Path, *words: str) -> subprocess.Popen[str]:
    return processes.start(clone, "src.sweep", *words)


def workers_of(sweep: int) -> list[psutil.Process]:
    """The processes that were forked from a sweep's fork server."""
    children = psutil.Process(sweep).children(recursive=True)
    return [child for child in children if "forkserver" in " ".join(child.cmdline()) and child.ppid() != sweep]


def folder_of(clone: Path, study: str) -> Path:
    return clone / "experiments" / "sweeps" / study


def trials_of(clone: Path, study: str) -> list[dict[str, str]]:
    """The table of trials, without what the clock says."""
    with (folder_of(clone, study) / "trials.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def uninterrupted(clone: Path, run: Run) -> str:
    """The output of an uninterrupted study."""
    return run(*SWEEP, *CIFAR, f"sweep.trials={TRIALS}", "sweep.study=uninterrupted").stdout


def test_a_study_that_was_killed_is_resumed_to_the_trials_of_one_that_was_not(
    uninterrupted: str, clone: Path, run: Run
) -> None:
    words = (*CIFAR, "sweep.study=killed")
    first = start(clone, *words, "sweep.trials=6")  # it is extended later on
    wait_for(first, r"^ +2 ")
    (worker,) = workers_of(first.pid)
    time.sleep(0.3)  # into the next trial
    first.kill()
    first.wait(60)
    worker.wait(10)  # it does not outlive the sweep
    run(*SWEEP, *words, "sweep.trials=6")
    assert len(trials_of(clone, "killed")) == 6
    second = start(clone, *words, f"sweep.trials={TRIALS}")
    wait_for(second, r"^ +8 ")
    time.sleep(0.3)
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 130, output
    assert "the same command goes on" in output
    done = run(*SWEEP, *words, f"sweep.trials={TRIALS}")
    assert [row["trial"] for row in trials_of(clone, "killed")] == list(map(str, range(TRIALS)))
    assert trials_of(clone, "killed") == trials_of(clone, "uninterrupted")
    nothing = run(*SWEEP, *words, f"sweep.trials={TRIALS}")
    assert f"{TRIALS} of them have ended" in nothing.stdout
    assert not re.search(r"^ +\d+ +(complete|pruned|fail)", nothing.stdout, re.MULTILINE)
    assert re.search(r"best: trial \d+", done.stdout)


def test_the_table_s_lines_are_the_trials(uninterrupted: str, clone: Path) -> None:
    lines = re.findall(r"^ +(\d+)  (complete|pruned|fail)", uninterrupted, re.MULTILINE)
    assert lines == [(row["trial"], row["state"]) for row in trials_of(clone, "uninterrupted")]
    assert {"complete", "pruned"} == {
        row["state"] for row in trials_of(clone, "uninterrupted")
    }  # the median prunes some


def test_another_search_under_a_study_s_name_is_refused_and_what_differs_named(
    uninterrupted: str, clone: Path, run: Run
) -> None:
    done = run(*SWEEP, *CIFAR, "sweep.study=uninterrupted", "sweep.sampler=random", "seed=3", check=False)
    assert done.returncode == 1
    assert 'the study uninterrupted is another: seed was 0, is 3; sweep.sampler was "tpe", is "random"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_printed_commands_train_the_best_trial_to_the_same_figures_and_adopt_it(
    uninterrupted: str, clone: Path, run: Run
) -> None:
    number = re.search(r"best: trial (\d+), val_accuracy [\d.]+", uninterrupted)
    commands = re.findall(r"^  (python -m src\.(?:train|adopt) .*)$", uninterrupted, re.MULTILINE)
    assert number and len(commands) == 2
    train, adopt = map(shlex.split, commands)
    again = run(*train)
    output = re.search(r"trained in [\d.]+ s: (\S+)/train", again.stdout)
    assert output
    folder = folder_of(clone, "uninterrupted")
    for name in ("metrics.json", "history.csv"):
        trained = (clone / output[1] / "train" / name).read_text()
        assert trained == (folder / "trials" / number[1] / "train" / name).read_text()
    before = (clone / "params.yaml").read_text()
    try:
        run(*adopt)
        adopted = (clone / "params.yaml").read_text()
        assert "#   dvc exp run -S profile=full" in adopted  # comments stay
        assert "lr" in yaml.safe_load(adopted)["experiments"]["cifar10_resnet"]["overrides"]["model"]["optimizer"]
        run("python", "-m", "src.compose", "experiment", "cifar10_resnet")
        composed = yaml.safe_load((clone / "experiments" / "cifar10_resnet" / "config.yaml").read_text())
        trained = yaml.safe_load((clone / output[1] / "config.yaml").read_text())
        assert composed["model"] == trained["model"]
    finally:
        (clone / "params.yaml").write_text(before)
        subprocess.run(["git", "checkout", "--quiet", "experiments"], cwd=clone, check=True)


def test_every_trial_is_a_run_under_the_sweep_s_whose_page_carries_best_and_plots(
    uninterrupted: str, clone: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'experiments' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cifar10_resnet")
    assert experiment
    (parent,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'sweep uninterrupted'")
    assert parent.info.status == "FINISHED"
    best = re.search(r"best: trial (\d+), val_accuracy ([\d.]+)", uninterrupted)
    assert best
    assert parent.data.tags["best.trial"] == best[1]
    assert float(parent.data.tags["best.val_accuracy"]) == pytest.approx(float(best[2]), rel=1e-4)
    assert "best.model.optimizer.lr" in parent.data.tags
    assert parent.data.params["sweep.space.model.optimizer.lr"] == "float [0.03, 0.4], log"
    names = {file.path for place in (None, "plots") for file in client.list_artifacts(parent.info.run_id, place)}
    pictures = {"plots/history.png", "plots/importance.png", "plots/parallel.png"}
    assert {"best.yaml", "trials.csv"} | pictures <= names
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    assert {run.data.tags["sweep.trial"] for run in children} == set(map(str, range(TRIALS)))
    assert {run.info.status for run in children} == {"FINISHED"}


def test_a_run_s_name_says_what_the_command_line_changed_in_short(clone: Path, run: Run) -> None:
    from mlflow import MlflowClient

    small = (
        "+experiment=cifar10_resnet",
        "debug=fast",
        "tracking=true",
        "model.label_smoothing=0.123456789",
        "data.sha256=null",
        "seed=3",
    )
    run("python", "-m", "src.train", *small)
    client = MlflowClient(f"sqlite:///{clone / 'experiments' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cifar10_resnet")
    assert experiment
    newest = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=1)
    assert newest[0].info.run_name == "label_smoothing=0.1235 fast seed 3 sample"


def test_trials_that_fail_are_recorded_with_their_reason_and_the_sweep_goes_on(clone: Path, run: Run) -> None:
    """A grid of pix2pix: one sound trial, a loss that becomes NaN, and networks too large for the memory."""
    done = run(
        *SWEEP,
        "+experiment=facades_pix2pix",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1",
        "trainer.max_epochs=1",
        "trainer.threads=1",
        "sweep.sampler=grid",
        "sweep.study=faults",
        "sweep.space={model.optimizer.lr: {choice: [0.0002, 1e38]}, model.width: {choice: [4, 2000000]}}",
    )
    rows = {(row["model.optimizer.lr"], row["model.width"]): row for row in trials_of(clone, "faults")}
    assert len(rows) == 4  # the grid's points, though twenty trials were allowed
    assert rows["0.0002", "4"]["state"] == "complete"
    assert rows["1e+38", "4"]["state"] == "fail"
    assert "NaN" in rows["1e+38", "4"]["reason"]
    assert rows["0.0002", "2000000"]["state"] == rows["1e+38", "2000000"]["state"] == "fail"
    assert "memory" in rows["0.0002", "2000000"]["reason"]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_sweep_fails_if_all_its_trials_do(clone: Path, run: Run) -> None:
    space = "sweep.space={model.optimizer.lr: {choice: [1e37, 1e38]}}"
    words = [*CIFAR[:-1], space, "sweep.sampler=grid", "sweep.study=hopeless"]
    done = run(*SWEEP, *words, check=False)
    assert done.returncode == 1
    assert re.search(r"sweep failed: all 2 trials failed: [12] x .*NaN.*/trials/\*/log\.txt", done.stderr)


def test_an_objective_that_the_model_never_logs_ends_the_sweep_at_the_first_validation(clone: Path, run: Run) -> None:
    task = clone / "src" / "tasks" / "classification.py"
    undeclared = '"f1": Metric("max", "F1", is_fraction=True'
    with edited(task, undeclared, f"{undeclared}, is_validated=True"):
        done = run(*SWEEP, *CIFAR, "sweep.objectives={val_f1: max}", "sweep.study=unlogged", check=False)
    assert done.returncode == 1
    assert "sweep failed: val_f1: the validation logs no such metric, but val_accuracy, val_loss" in done.stderr
    trials = folder_of(clone, "unlogged") / "trials"
    assert [path.name for path in trials.iterdir()] == ["0"]
    assert "epoch 1/" not in (trials / "0" / "log.txt").read_text()


@pytest.mark.long
def test_two_workers_find_a_pareto_front_although_one_of_them_is_killed(clone: Path) -> None:
    process = start(
        clone,
        "+experiment=imdb_lstm",
        "trainer.limit_train_batches=6",
        "trainer.limit_val_batches=1",
        "trainer.max_epochs=1",
        "model.embedding=8",
        "sweep.workers=2",
        "sweep.trials=7",
        "sweep.pruner=none",
        "sweep.study=front",
        "sweep.objectives={val_accuracy: max, parameters: min}",
        "sweep.space={model.hidden: {int: [4, 16], step: 4}, model.pairs: {choice: {none: null, some: 4096}}}",
    )
    wait_for(process, r"^ +\d+  complete")
    victim = workers_of(process.pid)[0]
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert re.search(r"trial \d+: its process died \(SIGKILL", output)
    rows = trials_of(clone, "front")
    assert [row["trial"] for row in rows] == list(map(str, range(7)))
    assert {row["state"] for row in rows} == {"complete"}
    folder = folder_of(clone, "front")
    assert (folder / "plots" / "pareto.png").is_file()
    best = [float(row["val_accuracy"]) for row in rows]
    head = (folder / "best.yaml").read_text().splitlines()[0]
    assert f"val_accuracy {max(best):.6g}" in head
    threads: Any = yaml.safe_load((folder / "trials" / "0" / "config.yaml").read_text())["trainer"]["threads"]
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2)


@pytest.mark.long
def test_memory_stays_from_trial_to_trial(clone: Path) -> None:
    """Resident memory of the sweep and its processes; benchmarks/sweep.py looks at it over a hundred trials."""
    small = [word for word in CIFAR if not word.startswith("trainer.max_epochs")]
    process = start(clone, *small, "trainer.max_epochs=1", "sweep.trials=26", "sweep.study=long")
    sizes = {}
    for trial in (10, 25):
        wait_for(process, rf"^ +{trial} ")
        sweep = psutil.Process(process.pid)
        sizes[trial] = sum(child.memory_info().rss for child in [sweep, *sweep.children(recursive=True)])
    process.communicate(timeout=120)
    assert sizes[25] < 1.05 * sizes[10]
