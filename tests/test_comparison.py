"""Comparison of runs: grouping, differing keys, summaries, and tests of significance."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from src.common.paths import ROOT
from src.configuration.composing import compose
from src.reporting import comparison, comparison_page, significance, tables
from src.summary import summary


def write_run(folder: Path, *overrides: str, value: float, experiment: str = "cifar10_resnet", **metrics: Any) -> Path:
    """Writes a run's folder as training and evaluation do: `value` is its validation accuracy."""
    (folder / "train").mkdir(parents=True)
    config = compose([f"experiment={experiment}", *overrides, "output=."]).plain()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"epoch": epoch, "val_accuracy": value * epoch / 2, "train_loss": 1 / epoch} for epoch in (1, 2)]
    tables.write_csv(folder / "train" / "history.csv", rows)
    tables.write_metrics(folder / "train" / "metrics.json", {"profile": "sample", **rows[-1]})
    tables.write_metrics(
        folder / "metrics.json", {"profile": "sample", "accuracy": value - 0.01, "examples": 9, **metrics}
    )
    return folder


def group_of(folder: Path) -> comparison.Group:
    (group,) = comparison.grouped(list(comparison.read_runs([folder])), folder / "dvc")
    return group


def test_runs_of_one_configuration_form_a_variant_newest_per_seed(
    tmp_path: Path,
) -> None:
    for seed, value in ((0, 0.5), (1, 0.6), (2, 0.7)):
        write_run(tmp_path / f"a{seed}", f"seed={seed}", value=value)
    write_run(tmp_path / "b0", "seed=0", "model.optimizer.lr=0.5", value=0.2)
    write_run(tmp_path / "z", "seed=2", "trainer.log_every=7", value=0.8)  # as a2: the key does not affect results
    (tmp_path / "half" / "train").mkdir(parents=True)  # an incomplete run
    group = group_of(tmp_path)
    assert [sorted(variant.by_seed) for variant in group.variants] == [[0, 1, 2], [0]]
    assert group.differing == ["model.optimizer.lr"]
    summary = group.variants[0].summary("val_accuracy")
    assert summary
    values = [0.5, 0.6, 0.8]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert summary.count == 3
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.deviation == pytest.approx(np.std(values, ddof=1))
    assert (summary.low, summary.high) == pytest.approx((low, high))
    single = group.variants[1].summary("test_accuracy")
    assert single == significance.Summary(1, 0.19, None, None, None)
    assert group.metrics[:2] == ["val_accuracy", "test_accuracy"]


def test_a_difference_is_reported_only_where_it_is_significant(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    base = random.normal(0.5, 0.05, 8)
    noise = 0.01 * np.array([1, -1] * 4)
    for seed in range(8):
        write_run(tmp_path / f"a{seed}", f"seed={seed}", value=base[seed])
        better, same = base[seed] + 0.03 + noise[seed], base[seed] + noise[seed]
        write_run(tmp_path / f"b{seed}", f"seed={seed}", "model.optimizer.lr=0.5", value=better)
        if seed < 7:
            write_run(tmp_path / f"c{seed}", f"seed={seed}", "model.optimizer.lr=0.6", value=same)
    group = group_of(tmp_path)
    tests = group.tests("val_accuracy")
    assert tests[2].verdict == "better"
    assert tests[2].difference == pytest.approx(np.mean(0.03 + noise), abs=1e-6)
    raw = stats.ttest_1samp(0.03 + noise, 0).pvalue
    assert tests[2].p == pytest.approx(2 * raw, rel=1e-3)  # Holm: the smaller of two
    assert tests[3].verdict == significance.NO_DIFFERENCE
    assert tests[3].seeds == 7
    table = comparison_page.text(group, ["val_accuracy"])
    assert "no difference shown" in table
    assert "sample data" in table


def test_less_is_better_for_losses(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", f"seed={seed}", value=0.5, loss=1.0 + 0.01 * seed)
        write_run(tmp_path / f"b{seed}", f"seed={seed}", "model.optimizer.lr=0.5", value=0.5, loss=0.5 - 0.01 * seed)
    group = group_of(tmp_path)
    assert group.tests("test_loss")[2].verdict == "better"
    assert group.tests("val_accuracy")[2].verdict == significance.NO_DIFFERENCE  # equal values
    assert group.tests("val_accuracy")[2].p == 1.0


def test_the_direction_of_a_metric_is_the_one_its_task_declares(tmp_path: Path) -> None:
    """A lower MSE is better, fewer recognised images are worse, and the PCA baseline's MSE has no direction."""
    for seed in range(3):
        noise = 0.001 * seed
        metrics = {"mse": 0.02 + noise, "recognised": 0.5 + noise, "mse_pca": 0.02 + noise}
        write_run(tmp_path / f"a{seed}", f"seed={seed}", value=0.5, experiment="mnist_autoencoder", **metrics)
        metrics = {"mse": 0.01 - noise, "recognised": 0.4 - noise, "mse_pca": 0.01 - noise}
        overrides = (f"seed={seed}", "model.optimizer.lr=0.5")
        write_run(tmp_path / f"b{seed}", *overrides, value=0.5, experiment="mnist_autoencoder", **metrics)
    group = group_of(tmp_path)
    verdicts = {metric: group.tests(f"test_{metric}")[2].verdict for metric in ("mse", "recognised", "mse_pca")}
    assert verdicts == {"mse": "better", "recognised": "worse", "mse_pca": "different"}
    assert group.headline == ["val_loss", "test_mse"]


def test_fewer_than_two_common_seeds_are_not_tested(tmp_path: Path) -> None:
    write_run(tmp_path / "a0", "seed=0", value=0.5)
    write_run(tmp_path / "a1", "seed=1", value=0.5)
    write_run(tmp_path / "b", "seed=1", "model.optimizer.lr=0.5", value=0.6)
    write_run(tmp_path / "c", "seed=5", "model.optimizer.lr=0.6", value=0.6)
    tests = group_of(tmp_path).tests("val_accuracy")
    assert {test.seeds: test.p for test in tests.values()} == {1: None, 0: None}
    assert all(test.verdict.startswith("not tested") for test in tests.values())


@pytest.mark.parametrize("values", [[0.002, 0.002], [0.3 - 0.1, 0.2, 0.2]], ids=["two seeds", "up to rounding"])
def test_equal_differences_are_not_tested(values: list[float]) -> None:
    test = significance.paired_tests({2: values}, less_is_better=False)[2]
    assert (test.p, test.verdict) == (None, "not tested: the differences are equal; add seeds")
    assert (test.seeds, test.difference) == (len(values), pytest.approx(values[0]))


def test_profiles_are_never_mixed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "seed=0", value=0.5)
    write_run(tmp_path / "b", "seed=0", "profile=full", value=0.9)
    groups = comparison.grouped(list(comparison.read_runs([tmp_path])), tmp_path / "dvc")
    assert [(group.profile, len(group.variants)) for group in groups] == [("full", 1), ("sample", 1)]


def test_the_command_prints_a_table_and_writes_csv_and_html(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / "runs" / f"a{seed}", f"seed={seed}", value=0.5 + 0.1 * seed)
        write_run(tmp_path / "runs" / f"b{seed}", f"seed={seed}", "model.label_smoothing=0.1", value=0.52 + 0.1 * seed)
    command = [sys.executable, "-m", "src.compare", str(tmp_path / "runs")]
    files = ["--csv", str(tmp_path / "c.csv"), "--html", str(tmp_path / "c.html")]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.label_smoothing" in done.stdout
    assert "2 against 1, val_accuracy: +0.02" in done.stdout
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "val_accuracy"]
    assert [(row["variant"], row["seeds"], float(row["mean"])) for row in rows] == [("1", "2", 0.55), ("2", "2", 0.57)]
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # curves, and intervals of two metrics
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    unknown = subprocess.run([*command, "-m", "acuracy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("compare failed: acuracy: no run has this metric; there are ")
    empty = subprocess.run(
        [sys.executable, "-m", "src.compare", "nothing"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "no whole run" in empty.stderr


def test_the_summary_of_the_pipeline_has_each_experiment_s_headline_in_80_columns(tmp_path: Path) -> None:
    names = ["cifar10_resnet", "an_experiment_with_a_name_of_40_letters_", "facades_pix2pix"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"run": dict.fromkeys(names, "data")}, sort_keys=False))
    folder = write_run(tmp_path / "experiments" / names[0], "seed=0", value=0.5)
    write_run(tmp_path / "experiments" / names[1], value=0.5, experiment="mnist_autoencoder", mse=0.02)
    (folder / "train" / "model.json").write_text(json.dumps({"sha256": "ab"}))
    (folder / "training_time.json").write_text(json.dumps({"seconds": 12.4, "sha256": "ab"}))
    lines = list(summary(tmp_path))
    assert max(map(len, lines)) < 80
    rows = [line.split() for line in lines[1:4]]
    assert rows[0] == ["cifar10_resnet", "test_accuracy", "0.49", "higher", "12", "s"]
    assert rows[1][1:] == ["test_mse", "0.02", "lower", "elsewhere"]
    assert rows[2] == ["facades_pix2pix", "no", "result:", "dvc", "repro"]
    assert "sample" in lines[-1]
    (folder / "train" / "model.json").write_text(json.dumps({"sha256": "cd"}))  # fetched with DVC since
    assert next(line for line in summary(tmp_path) if line.startswith("cifar")).endswith("elsewhere")


def test_a_run_whose_files_are_damaged_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "seed=0", value=0.5)
    (folder / "train" / "metrics.json").write_text(json.dumps({"val_accuracy": 1})[:-3])
    assert list(comparison.read_runs([tmp_path])) == []
