"""The autoencoder and the DCGAN trained, evaluated, exported and called, as real processes."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Run
from tests.test_runs import output_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = (
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=4",
    "trainer.threads=1",
    "evaluation.judge_steps=20",
    "export.latency_seconds=0.05",
    "export.int8=true",
)
# With one latent dimension the images lie along a curve: close neighbours count as a collapse.
COLLAPSING = {"mnist_dcgan": ("model.latent=1",)}
METRICS = {
    "mnist_autoencoder": {"mse", "psnr", "ssim", "mse_pca", "recognised"},
    "mnist_dcgan": {"frechet", "precision", "recall", "diversity", "classes_drawn", "collapsed"},
}


def artifacts_of(clone: Path, experiment: str) -> Path:
    """The artifact folder of the experiment's only run in the clone's MLflow store."""
    with sqlite3.connect(clone / "experiments" / "mlflow.db") as store:
        (uri,) = store.execute(
            "select r.artifact_uri from runs r join experiments e using (experiment_id) where e.name = ?", [experiment]
        ).fetchone()
    return Path(uri.removeprefix("file://"))


def descriptions(clone: Path) -> list[str]:
    """The descriptions (notes) of all MLflow runs."""
    with sqlite3.connect(clone / "experiments" / "mlflow.db") as store:
        rows = store.execute("select value from tags where key = 'mlflow.note.content'").fetchall()
    return [note for (note,) in rows]


@pytest.mark.long
@pytest.mark.parametrize("experiment", METRICS)
def test_a_classic_network_goes_through_all_stages(experiment: str, clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", f"+experiment={experiment}", *SMALL, *COLLAPSING.get(experiment, ()))
    output = output_of(done.stdout)
    folder = clone / output
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"../{output}", "-cn", "config")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["profile"] == "sample"
    assert METRICS[experiment] <= set(metrics)

    assert "In int8 the answers differ from the fp32 graph's by" in (folder / "export" / "README.md").read_text()

    pictures = [f"epoch_{epoch:03}.png" for epoch in (1, 2)]
    assert sorted(path.name for path in folder.glob("progress/*")) == pictures
    assert sorted(path.name for path in artifacts_of(clone, experiment).glob("progress/*")) == pictures

    Image.new("L", (28, 28), 200).save(clone / "input.png")
    model, picture = f"{output}/export", clone / "output.png"
    if experiment == "mnist_autoencoder":
        run("python", "-m", "src.predict", model, "input.png", "--int8", "--output", str(picture))
        assert Image.open(picture).size == (28, 28)
    else:
        run("python", "-m", "src.predict", model, "--int8", "--count", "9", "--seed", "3", "--output", str(picture))
        assert Image.open(picture).size == (3 * 28, 3 * 28)
        message = re.search(r"^The generator collapsed in epoch 1: .*$", done.stdout, re.MULTILINE)
        assert message
        assert any(message[0] in note for note in descriptions(clone))
