"""The pipeline from a user's view: `dvc repro` in a clean clone, and its outputs."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import Run

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]

EXPERIMENTS = ("cifar10_resnet", "imdb_lstm", "facades_pix2pix")


@pytest.fixture(scope="module")
def repro(clone: Path, run: Run) -> str:
    """The output of `dvc repro` in a clean clone; it runs once for this module."""
    return run("dvc", "repro", timeout=900).stdout


def metrics(clone: Path, name: str) -> dict[str, float]:
    return json.loads((clone / "experiments" / name / "metrics.json").read_text())


def stages(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


def test_every_stage_of_every_experiment_runs(repro: str) -> None:
    executed = stages(repro)
    for name in EXPERIMENTS:
        assert [f"{stage}@{name}" for stage in ("train", "evaluate", "export") if f"{stage}@{name}" in executed] == [
            f"train@{name}",
            f"evaluate@{name}",
            f"export@{name}",
        ]
    assert {
        f"{stage}@{data}" for stage in ("download", "preprocess", "describe") for data in ("cifar10", "imdb", "facades")
    } <= set(executed)


def test_training_on_the_sample_beats_chance_by_a_wide_margin(repro: str, clone: Path) -> None:
    assert metrics(clone, "cifar10_resnet")["accuracy"] > 0.7  # chance 0.1, a linear classifier 0.35
    assert metrics(clone, "imdb_lstm")["accuracy"] > 0.7  # chance 0.5
    facades = metrics(clone, "facades_pix2pix")
    assert facades["l1"] < 0.16
    assert facades["labels_recovered"] > 0.7


def test_metrics_and_model_cards_name_the_sample_profile(repro: str, clone: Path) -> None:
    for name in EXPERIMENTS:
        assert metrics(clone, name)["profile"] == "sample"
        assert json.loads((clone / "experiments" / name / "train" / "metrics.json").read_text())["profile"] == "sample"
        assert "sample data" in (clone / "experiments" / name / "export" / "README.md").read_text().lower()


def test_a_second_repro_runs_nothing_and_is_quick(repro: str, run: Run) -> None:
    run("dvc", "repro")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("dvc", "repro")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert stages(done.stdout) == []
    # Seconds of this process alone: a busy machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4


def test_dvc_shows_the_metrics_and_plots(repro: str, run: Run) -> None:
    shown = json.loads(run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert {f"experiments/{name}/metrics.json" for name in EXPERIMENTS} <= set(shown)
    assert shown["data/reports/imdb/metrics.json"]["data"]["examples"]["train"] == 3600
    drawn = run("dvc", "plots", "show", "--json").stdout
    for name in EXPERIMENTS:
        assert f"experiments/{name}/train/history.csv" in drawn
        assert f"experiments/{name}/confusion.csv" in drawn
    assert "data/reports/cifar10/classes.csv" in drawn


def test_the_pictures_of_the_evaluation_are_not_blank(repro: str, clone: Path) -> None:
    from PIL import Image

    expected = {
        "cifar10_resnet": ("confusion", "calibration", "mistakes"),
        "imdb_lstm": ("confusion", "calibration"),
        "facades_pix2pix": ("grid",),
    }
    for name, pictures in expected.items():
        for picture in (f"evaluation/{stem}.png" for stem in pictures):
            with Image.open(clone / "experiments" / name / picture) as image:
                assert image.width >= 600
                assert len(image.convert("RGB").getcolors(1 << 20) or range(99)) > 10
    assert ", is neg" in (clone / "experiments" / "imdb_lstm" / "evaluation" / "mistakes.md").read_text()


def test_mlflow_has_one_complete_run_per_experiment(repro: str, clone: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone}/experiments/mlflow.db")
    for name in EXPERIMENTS:
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        (tracked,) = client.search_runs([experiment.experiment_id])
        assert tracked.info.status == "FINISHED"
        assert tracked.data.params["seed"] == "0"
        assert "model.optimizer.lr" in tracked.data.params
        assert (
            tracked.data.tags["git.commit"]
            == subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip()
        )
        assert len(tracked.data.tags["lock.sha256"]) == 64
        key = "test_accuracy" if name != "facades_pix2pix" else "test_labels_recovered"
        assert tracked.data.metrics[key] == pytest.approx(metrics(clone, name)[key.removeprefix("test_")], abs=1e-5)
        assert len(client.get_metric_history(tracked.info.run_id, "lr")) >= 4
        artifacts = {item.path for item in client.list_artifacts(tracked.info.run_id)}
        assert {"config.yaml", "evaluation", "export", "plots", "history.csv"} <= artifacts


def test_predict_tells_praise_from_criticism(repro: str, run: Run) -> None:
    praise = run(
        "python",
        "-m",
        "src.predict",
        "experiments/imdb_lstm/export",
        "A wonderful film, the best I have seen this year. I loved it.",
    ).stdout
    assert praise.splitlines()[0].endswith("pos")
    criticism = run(
        "python", "-m", "src.predict", "experiments/imdb_lstm/export", "The worst film ever. Boring, awful, a waste."
    ).stdout
    assert criticism.splitlines()[0].endswith("neg")


def test_predict_agrees_with_the_metrics_of_the_evaluation(repro: str, clone: Path, run: Run, tmp_path: Path) -> None:
    """The preprocessing is part of the exported model."""
    from PIL import Image
    from safetensors.numpy import load_file

    split = load_file(clone / "data" / "processed" / "sample" / "cifar10" / "test.safetensors")
    classes = json.loads((clone / "data" / "processed" / "sample" / "cifar10" / "meta.json").read_text())["classes"]
    correct = 0
    for number in range(5):
        photo = tmp_path / f"{number}.png"
        Image.fromarray(split["images"][number].transpose(1, 2, 0)).save(photo)
        answer = run(
            "python", "-m", "src.predict", "experiments/cifar10_resnet/export", str(photo), "--top", "1"
        ).stdout
        correct += answer.split()[-1] == classes[split["labels"][number]]
    assert correct >= 4
    facade = load_file(clone / "data" / "processed" / "sample" / "facades" / "test.safetensors")["input"][0]
    Image.fromarray(facade.transpose(1, 2, 0)).save(tmp_path / "labels.png")
    target = tmp_path / "photo.png"
    run(
        "python",
        "-m",
        "src.predict",
        "experiments/facades_pix2pix/export",
        str(tmp_path / "labels.png"),
        "--output",
        str(target),
    )
    with Image.open(target) as drawn:
        assert drawn.size == (64, 64)


def test_another_rate_of_the_lstm_reruns_only_its_own_stages(repro: str, clone: Path, run: Run) -> None:
    params = clone / "params.yaml"
    before = params.read_text()
    changed = yaml.safe_load(before)
    changed["experiments"]["imdb_lstm"]["overrides"]["model"]["optimizer"]["lr"] = 0.00123
    try:
        params.write_text(yaml.safe_dump(changed))
        run("dvc", "repro", "--single-item", *(f"compose@{name}" for name in EXPERIMENTS))
        run("dvc", "repro", "--single-item", *(f"compose_data@{name}" for name in ("cifar10", "imdb", "facades")))
        outdated = set(json.loads(run("dvc", "status", "--json").stdout))
        assert outdated == {"train@imdb_lstm", "evaluate@imdb_lstm", "export@imdb_lstm"}
    finally:
        params.write_text(before)
        run("dvc", "repro")  # from the run cache
        assert json.loads(run("dvc", "status", "--json").stdout) == {}


def test_outputs_that_dvc_hashes_hold_no_path_of_the_machine(repro: str, clone: Path) -> None:
    for name in EXPERIMENTS:
        folder = clone / "experiments" / name
        for path in [
            folder / "config.yaml",
            folder / "metrics.json",
            *(folder / "train").iterdir(),
            *(folder / "export").iterdir(),
        ]:
            content = path.read_bytes()
            assert str(clone).encode() not in content, path
            assert b"site-packages" not in content, path
