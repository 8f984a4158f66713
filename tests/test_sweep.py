"""Sweeps as real commands: killed, extended, with trials that fail, on several workers; and what they leave."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import processes
from tests.conftest import Run
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
TRIALS = 13  # beyond the ten that TPE draws at random


def start(clone: Path, *words: str) -> subprocess.Popen[str]:
    return processes.start(clone, "src.sweep", *words)


def workers_of(sweep: int) -> list[psutil.Process]:
    """The processes that were forked from the server of a sweep."""
    family = psutil.Process(sweep).children(recursive=True)
    return [each for each in family if "forkserver" in " ".join(each.cmdline()) and each.ppid() != sweep]


def folder_of(clone: Path, study: str) -> Path:
    return clone / "experiments" / "sweeps" / study


def trials_of(clone: Path, study: str) -> list[dict[str, str]]:
    """The table of trials, without what the clock says."""
    with (folder_of(clone, study) / "trials.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(clone: Path, run: Run) -> str:
    """What an uninterrupted study prints."""
    return run("python", "-m", "src.sweep", *CIFAR, f"sweep.trials={TRIALS}", "sweep.study=whole").stdout


def test_a_study_that_was_killed_is_resumed_to_the_trials_of_one_that_was_not(
    whole: str, clone: Path, run: Run
) -> None:
    words = (*CIFAR, "sweep.study=killed")
    first = start(clone, *words, "sweep.trials=6")  # it is extended later on
    wait_for(first, r"^ +2 ")
    (worker,) = workers_of(first.pid)
    time.sleep(0.3)  # into the next trial
    first.kill()
    first.wait(60)
    worker.wait(10)  # it does not outlive the sweep
    run("python", "-m", "src.sweep", *words, "sweep.trials=6")
    assert len(trials_of(clone, "killed")) == 6
    second = start(clone, *words, f"sweep.trials={TRIALS}")
    wait_for(second, r"^ +8 ")
    time.sleep(0.3)
    second.send_signal(signal.SIGINT)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 130, said
    assert "the same command goes on" in said
    done = run("python", "-m", "src.sweep", *words, f"sweep.trials={TRIALS}")
    assert [row["trial"] for row in trials_of(clone, "killed")] == list(map(str, range(TRIALS)))
    assert trials_of(clone, "killed") == trials_of(clone, "whole")
    nothing = run("python", "-m", "src.sweep", *words, f"sweep.trials={TRIALS}")
    assert f"{TRIALS} of them have ended" in nothing.stdout
    assert not re.search(r"^ +\d+ +(complete|pruned|fail)", nothing.stdout, re.MULTILINE)
    assert re.search(r"best: trial \d+", done.stdout)


def test_the_table_s_lines_are_the_trials(whole: str, clone: Path) -> None:
    lines = re.findall(r"^ +(\d+)  (complete|pruned|fail)", whole, re.MULTILINE)
    assert lines == [(row["trial"], row["state"]) for row in trials_of(clone, "whole")]
    assert {"complete", "pruned"} == {row["state"] for row in trials_of(clone, "whole")}  # the median prunes some


def test_another_search_under_a_study_s_name_is_refused_and_what_differs_named(
    whole: str, clone: Path, run: Run
) -> None:
    done = run("python", "-m", "src.sweep", *CIFAR, "sweep.study=whole", "sweep.sampler=random", "seed=3", check=False)
    assert done.returncode == 1
    assert 'the study whole is another: seed was 0, is 3; sweep.sampler was "tpe", is "random"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_best_trial_trains_again_to_the_same_figures_and_goes_into_params_yaml(
    whole: str, clone: Path, run: Run
) -> None:
    found = re.search(r"best: trial (\d+), val_accuracy ([\d.]+)", whole)
    assert found
    folder = folder_of(clone, "whole")
    best = "experiments/sweeps/whole/best.yaml"
    again = run("python", "-m", "src.train", "+experiment=cifar10_resnet", f"+best={best}", "trainer.threads=1")
    output = re.search(r"trained in [\d.]+ s: (\S+)/train", again.stdout)
    assert output
    for name in ("metrics.json", "history.csv"):
        trained = (clone / output[1] / "train" / name).read_text()
        assert trained == (folder / "trials" / found[1] / "train" / name).read_text()
    before = (clone / "params.yaml").read_text()
    try:
        run("python", "-m", "src.adopt", "cifar10_resnet", best)
        adopted = (clone / "params.yaml").read_text()
        assert "#   dvc exp run -S profile=full" in adopted  # comments stay
        chosen = yaml.safe_load(adopted)["experiments"]["cifar10_resnet"]["overrides"]["model"]
        assert chosen["optimizer"]["lr"] == yaml.safe_load((clone / best).read_text())["model"]["optimizer"]["lr"]
        run("python", "-m", "src.compose", "experiment", "cifar10_resnet")
        composed = yaml.safe_load((clone / "experiments" / "cifar10_resnet" / "config.yaml").read_text())
        trained = yaml.safe_load((clone / output[1] / "config.yaml").read_text())
        assert composed["model"] == trained["model"]
    finally:
        (clone / "params.yaml").write_text(before)
        subprocess.run(["git", "checkout", "--quiet", "experiments"], cwd=clone, check=True)


def test_every_trial_is_a_run_under_the_sweep_s_whose_page_carries_best_and_plots(whole: str, clone: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'experiments' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cifar10_resnet")
    assert experiment
    (parent,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'sweep whole'")
    assert parent.info.status == "FINISHED"
    found = re.search(r"best: trial (\d+), val_accuracy ([\d.]+)", whole)
    assert found
    assert parent.data.tags["best.trial"] == found[1]
    assert float(parent.data.tags["best.val_accuracy"]) == pytest.approx(float(found[2]), rel=1e-4)
    assert "best.model.optimizer.lr" in parent.data.tags
    assert parent.data.params["sweep.space.model.optimizer.lr"] == "float [0.03, 0.4], log"
    names = {file.path for place in (None, "plots") for file in client.list_artifacts(parent.info.run_id, place)}
    pictures = {"plots/history.png", "plots/importance.png", "plots/parallel.png"}
    assert {"best.yaml", "trials.csv", "study.html"} | pictures <= names
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    assert {run.data.tags["sweep.trial"] for run in children} == set(map(str, range(TRIALS)))
    assert {run.info.status for run in children} == {"FINISHED"}
    page = (folder_of(clone, "whole") / "study.html").read_text()
    assert "sample data, not a benchmark" in page
    assert not re.search(r"<script[^>]+src=", page)  # readable without a network


def test_a_run_s_name_says_what_the_command_line_changed_in_short(clone: Path, run: Run) -> None:
    from mlflow import MlflowClient

    small = (
        "+experiment=cifar10_resnet",
        "debug=fast",
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
    """Three faults and two sound trials of pix2pix: a loss that is no number, and a network that no memory holds."""
    done = run(
        "python",
        "-m",
        "src.sweep",
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


@pytest.mark.long
def test_two_workers_find_a_pareto_front_though_one_of_them_is_killed(clone: Path) -> None:
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
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert re.search(r"trial \d+: its process died \(SIGKILL", said)
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
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        sizes[trial] = sum(each.memory_info().rss for each in family)
    process.communicate(timeout=120)
    assert sizes[25] < 1.05 * sizes[10]
