"""A task is one file and a kind of data is one file: both are added to a clone, and every stage works on them."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import run_in

pytestmark = pytest.mark.slow

KIND = '''
"""Numbers: `x` fp32 [N, 2] with the target `y` fp32 [N], and unpaired `noise` fp32 [M]."""

import numpy as np

from src.common.errors import Failure
from src.configuration.schema import Loader, NonNegative
from src.data.batching import Batches, generator
from src.data.kinds import Inputs


class NumberLoader(Loader):
    """Batches of numbers."""

    jitter: NonNegative = 0.0


class NumberBatches(Batches):
    """(x fp32 [B, 2], noise fp32 [B], y fp32 [B]); the noise is drawn from all that there is."""

    def collate(self, indices, index):
        import torch

        noise, random = self.split["noise"], generator(self.seed, "noise", self.epoch, index)
        drawn = noise[torch.randint(len(noise), (len(indices),), generator=random)]
        return self.split["x"][indices] + self.loader.jitter * drawn[:, None], drawn, self.split["y"][indices]


class Numbers:
    options = NumberLoader
    batches = NumberBatches
    inputs = Inputs(("x",), ({0: "batch"},))
    example_argument = "1,2"
    hub_prefix = "tabular"

    def count(self, arrays):
        return len(arrays["x"])

    def read(self, source, signature):
        if source is None:
            raise Failure(f"no input: {signature['name']} wants two numbers")
        return {"x": np.array([source.split(",")], np.float32)}

    def shown(self, split, meta, indices):
        return [str(split["x"][index].tolist()) for index in indices]

    def signature(self, meta, loader):
        return {"unit": meta["unit"]}

    def snippet(self, signature):
        return "x = np.array([[1, 2]], np.float32)\\n"


KIND = Numbers()
'''

TASK = '''
"""Regression: one number from others, and the features that it is made of."""

from src.configuration.metrics import Metric
from src.configuration.schema import Evaluation, PositiveInt
from src.data import kinds
from src.tasks import Answer, Evaluated, Task

METRICS = {"mae": Metric("min", "absolute error", is_validated=True), "loss": Metric("min", "loss")}


class RegressionOptions(Evaluation):
    """What evaluate shows."""

    examples: PositiveInt = 2


class Regression(Task):
    takes = ("numbers",)
    metrics = METRICS
    options = RegressionOptions
    outputs = ("number", "features")

    def evaluate(self, model, test, config, meta, folder):
        import torch

        errors = []
        with torch.inference_mode():
            for x, _, y in test:
                errors.append((model.answer(x)[0] - y).abs())
        (folder / "examples.txt").write_text("\\n".join(kinds.load("numbers").shown(test.split, meta, [0, 1])))
        return Evaluated({"mae": float(torch.cat(errors).mean())})

    def decode(self, outputs, request, signature):
        return Answer([f"{outputs[0][0]:.2f} {signature['unit']}, of {outputs[1].shape[1]} features"])

    def hub_tag(self, signature):
        return "tabular-regression"

    def snippet(self, signature):
        return kinds.load("numbers").snippet(signature) + 'print(session.run(None, {"x": x})[0])\\n'


TASK = Regression()
'''

MODEL = '''
"""A linear model with a figure that is no mean: the largest error of an epoch."""

import torch
from torch import nn
from torchmetrics import MaxMetric

from src.configuration.schema import Optimizer, Schedule
from src.models.base import Model


class Line(Model):
    task = "regression"

    def __init__(self, meta, *, optimizer: Optimizer, schedule: Schedule) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, train=("loss",), val=("mae",))
        self.layer = nn.Linear(2, 4)
        self.largest = MaxMetric()

    def answer(self, x):
        features = self.layer(x)
        return features.sum(1), features

    def training_step(self, batch, batch_idx):
        x, _, y = batch
        errors = self.answer(x)[0] - y
        self.largest.update(errors.detach().abs().max())
        self.add("train", len(y), loss=errors.square().sum())
        return errors.square().mean()

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("train_largest_error", self.largest.compute())
        self.largest.reset()

    def validation_step(self, batch, batch_idx):
        x, _, y = batch
        self.add("val", len(y), mae=(self.answer(x)[0] - y).abs().sum())
'''

DATA_SET = '''
"""y = 3 a + b, drawn; the archive only says how many."""

import numpy as np

from src.data.packed import Packed


class Lines:
    kind = "numbers"
    archive_name = "lines.tar"

    def __init__(self) -> None: ...

    def pack(self, archive):
        random = np.random.default_rng(0)
        splits = {}
        for split in ("train", "val", "test"):
            x = random.normal(size=(64, 2)).astype(np.float32)
            splits[split] = {"x": x, "y": 3 * x[:, 0] + x[:, 1], "noise": random.normal(size=7).astype(np.float32)}
        return Packed(splits, {"kind": self.kind, "unit": "m", "duplicates": {}})
'''

FILES = {
    "src/data/kinds/numbers.py": KIND,
    "src/tasks/regression.py": TASK,
    "src/models/line.py": MODEL,
    "src/data/sets/lines.py": DATA_SET,
    "conf/data/lines.yaml": (
        "_target_: src.data.sets.lines.Lines\nname: lines\nloader: {batch_size: 16, jitter: 0.001}\n"
    ),
    "conf/model/line.yaml": (
        "_target_: src.models.line.Line\noptimizer: {name: adam, lr: 0.1}\nschedule: {name: constant}\n"
    ),
    "conf/experiment/lines.yaml": (
        "# @package _global_\ndefaults:\n  - override /data: lines\n  - override /model: line\n"
        "name: lines\ndescription: A line.\ntrainer: {max_epochs: 30, monitor: val_mae, keep: best}\n"
        "evaluation: {examples: 3}\n"
    ),
}


@pytest.fixture(scope="module")
def house(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the new files and with no other change."""
    folder = tmp_path_factory.mktemp("new") / "house"
    subprocess.run(["git", "clone", "--quiet", str(clone), str(folder)], check=True)
    for name, content in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(content)
    (folder / "archive").mkdir()
    (folder / "archive" / "count.txt").write_text("64")
    return folder


def python(house: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_in(house, "python", "-m", *words, check=False)


def test_a_new_task_on_a_new_kind_of_data_is_trained_evaluated_exported_and_called(house: Path) -> None:
    words = [
        "+experiment=lines",
        "profile=full",
        f"data.archive={house / 'archive'}",
        "hydra.run.dir=experiments/runs/x",
    ]
    for command in (
        ["src.train", *words],
        ["src.evaluate", "-cp", str(house / "experiments/runs/x"), "-cn", "config"],
        ["src.export", "-cp", str(house / "experiments/runs/x"), "-cn", "config"],
    ):
        done = python(house, *command)
        assert done.returncode == 0, done.stderr[-3000:]
    run = house / "experiments" / "runs" / "x"
    assert json.loads((run / "metrics.json").read_text())["mae"] < 0.2
    assert {path.name for path in (run / "evaluation").iterdir()} == {"examples.txt", "curves.png"}
    with (run / "train" / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_largest_error"]) < float(rows[0]["train_largest_error"])
    best = min(rows, key=lambda row: float(row["val_mae"]))  # less is better, says the task
    assert json.loads((run / "train" / "model.json").read_text())["kept_epoch"] == int(best["epoch"])
    answer = python(house, "src.predict", str(run / "export"), "1,2")
    number, unit = answer.stdout.removesuffix(", of 4 features\n").split()
    assert (float(number), unit) == (pytest.approx(5, abs=0.3), "m")


def test_what_a_new_task_does_not_have_is_refused(house: Path) -> None:
    refused = python(house, "src.train", "+experiment=lines", "trainer.monitor=val_loss", "evaluation.mistakes=3")
    assert refused.returncode == 2
    assert (
        "evaluation.mistakes: unknown key; allowed: examples (mistakes is for classification and tagging)"
        in refused.stderr
    )
    misfit = python(house, "src.train", "+experiment=lines", "model=lstm")
    assert "data: lines holds numbers, and src.models.lstm.TextClassifier" in misfit.stderr
