"""The classic networks as a user runs them: trained, evaluated, exported and called, as real processes."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FEW = (
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=4",
    "trainer.threads=1",
    "evaluation.judge_steps=20",
    "export.latency_seconds=0.05",
    "export.int8=true",
)
# Images that are drawn from a single number lie along a line: each has others right beside it.
COLLAPSING = {"mnist_dcgan": ("model.latent=1",)}
FIGURES = {
    "mnist_autoencoder": {"mse", "psnr", "ssim", "mse_pca", "recognised"},
    "mnist_dcgan": {"frechet", "precision", "recall", "diversity", "classes_drawn", "collapsed"},
}


def logged(clone: Path, experiment: str) -> Path:
    """The folder of the experiment's only run in the clone's MLflow store."""
    with sqlite3.connect(clone / "experiments" / "mlflow.db") as store:
        (uri,) = store.execute(
            "select r.artifact_uri from runs r join experiments e using (experiment_id) where e.name = ?", [experiment]
        ).fetchone()
    return Path(uri.removeprefix("file://"))


def descriptions(clone: Path) -> list[str]:
    """What MLflow shows above its runs."""
    with sqlite3.connect(clone / "experiments" / "mlflow.db") as store:
        found = store.execute("select value from tags where key = 'mlflow.note.content'").fetchall()
    return [note for (note,) in found]


@pytest.mark.long
@pytest.mark.parametrize("experiment", FIGURES)
def test_a_classic_network_goes_through_all_stages(experiment: str, clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", f"+experiment={experiment}", *FEW, *COLLAPSING.get(experiment, ()))
    found = re.search(r"trained in [\d.]+ s: (\S+)/train", done.stdout)
    assert found
    folder = clone / found[1]
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"../{found[1]}", "-cn", "config")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["profile"] == "sample"
    assert FIGURES[experiment] <= set(metrics)

    assert "In int8 the answers differ from the fp32 graph's by" in (folder / "export" / "README.md").read_text()

    shown = [f"epoch_{epoch:03}.png" for epoch in (1, 2)]
    assert sorted(path.name for path in folder.glob("progress/*")) == shown
    assert sorted(path.name for path in logged(clone, experiment).glob("progress/*")) == shown

    Image.new("L", (28, 28), 200).save(clone / "given.png")
    model, made = f"{found[1]}/export", clone / "made.png"
    if experiment == "mnist_autoencoder":
        run("python", "-m", "src.predict", model, "given.png", "--int8", "--output", str(made))
        assert Image.open(made).size == (28, 28)
    else:
        run("python", "-m", "src.predict", model, "--int8", "--count", "9", "--seed", "3", "--output", str(made))
        assert Image.open(made).size == (3 * 28, 3 * 28)
        said = re.search(r"^The generator collapsed in epoch 1: .*$", done.stdout, re.MULTILINE)
        assert said
        assert any(said[0] in note for note in descriptions(clone))
