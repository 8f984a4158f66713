"""CycleGAN trained, evaluated, exported and called in both directions, as real processes; also rows of a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Run
from tests.test_runs import output_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def through_all_stages(run: Run, clone: Path, experiment: str, *overrides: str) -> Path:
    done = run("python", "-m", "src.train", f"+experiment={experiment}", "trainer.threads=1", *overrides)
    output = output_of(done.stdout)
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"../{output}", "-cn", "config")
    return clone / output


def test_cyclegan_translates_both_ways(clone: Path, run: Run, tmp_path: Path) -> None:
    folder = through_all_stages(
        run,
        clone,
        "facades_cyclegan",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=4",
        "model.width=4",
        "model.discriminator_width=4",
        "evaluation.segmenter_epochs=1",
        "export.latency_seconds=0.05",
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["features"] == "random-conv-1"
    expected = {"kid_to_a", "kid_to_b", "kid_domains", "frechet_to_a", "cycle_l1", "identity_l1", "l1_to_a"}
    assert expected | {"labels_recovered", "mapping_learnt_to_a"} <= set(metrics)
    assert [path.name for path in folder.glob("progress/*")] == ["epoch_001.png"]
    assert {"grid_to_a.png", "grid_to_b.png"} <= {path.name for path in (folder / "evaluation").iterdir()}

    picture = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(picture)
    model = folder.relative_to(clone) / "export"
    for words in ((), ("--to", "A")):
        run("python", "-m", "src.predict", str(model), str(picture), *words)
    to_b, to_a = (np.asarray(Image.open(tmp_path / f"photo-facades_cyclegan-{name}.png")) for name in "ba")
    assert to_a.shape == to_b.shape == (32, 32, 3)
    assert (to_a != to_b).any()
    refused = run("python", "-m", "src.predict", str(model), str(picture), "--to", "C", check=False)
    assert (refused.returncode, "allowed: A, B" in refused.stderr) == (1, True)


def test_rows_of_a_table_are_generated(clone: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    rows = np.random.default_rng(0).normal((5, -2), (1, 0.5), (200, 2))
    lines = ["height,depth", *(f"{x:.3f},{y:.3f}" for x, y in rows)]
    (tmp_path / "table" / "all.csv").write_text("\n".join(lines))
    folder = through_all_stages(
        run,
        clone,
        "curves_gan",
        "profile=full",
        f"data.archive={tmp_path}/table",
        "trainer.max_epochs=20",
        "model.latent=3",
    )
    assert json.loads((folder / "metrics.json").read_text())["frechet"] < 1
    words = ("--count", "50", "--format", "csv")
    answer = run("python", "-m", "src.predict", str(folder.relative_to(clone) / "export"), *words)
    header, *drawn = answer.stdout.splitlines()
    assert header == "input,height,depth"
    assert len(drawn) == 50
    assert np.mean([float(line.split(",")[1]) for line in drawn]) == pytest.approx(5, abs=1)
