"""What DVC runs again after an edit, asked of the real `dvc status` in a clone whose pipeline is up to date.

And whether an interrupted training would be resumed: only under the same fingerprint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import commands_environment
from tests.test_pipeline import EXPERIMENTS, repro  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(900)]

Edit = tuple[str, str, str]


def stages(*names: str, of: tuple[str, ...] = EXPERIMENTS) -> frozenset[str]:
    return frozenset(f"{stage}@{key}" for stage in names for key in of)


ALL = ("train", "evaluate", "export")
RESNET, LSTM, PIX2PIX = ("cifar10_resnet",), ("imdb_lstm",), ("facades_pix2pix",)
IMDB = ("imdb",)
DATA = ("cifar10", "imdb", "facades")

# Edits after which no stage runs again and an interrupted training is resumed.
WITHOUT_EFFECT: dict[str, Edit] = {
    "comment": ("src/data/augmentation.py", "def rotate(", "# a comment\ndef rotate("),
    "docstring": ("src/models/lstm.py", '"""A bidirectional', '"""Another bidirectional'),
    "formatting": ("src/models/resnet.py", "\n\n\ndef ", "\n\n\n\n\ndef "),
    "type annotation": ("src/models/lstm.py", "(x: Tensor, lengths: Tensor) -> Tensor:", "(x, lengths):"),
    "error message": ("src/models/pix2pix.py", "the U-Net takes pictures", "a U-Net takes images"),
    "printed line": ("src/training/run.py", "goes on with the run", "resumes the run"),
    "MLflow tag": ("src/tracking/run_facts.py", '"pipeline.profile"', '"pipeline.data_profile"'),
    "tracker": ("src/tracking/tracker.py", "self._append(", "self._append( "),
    "retry of the download": ("src/data/fetching/download.py", "_MAX_PAUSE = 60", "_MAX_PAUSE = 61"),
    "schema of the trainer": ("src/configuration/schema.py", "epochs of training", "how long it trains"),
    "command wrapper": ("src/configuration/command.py", "sys.exit(1)", "sys.exit(1) "),
    "sweep": ("src/sweeping/study.py", "import optuna", "import optuna\n\nx = 1"),
    "predict": ("src/predict.py", "import json", "import json\n\nx = 1"),
    "another model": ("src/models/recurrent.py", "nn.GRU", "nn.RNN"),
    "another task": ("src/tasks/generation.py", "TASK = ", "x = 1\nTASK = "),
    "another data set": ("src/data/sets/mnist.py", "zero, kind", "none, kind"),
    "README": ("README.md", "Two commands", "Two of the commands"),
    "package that computes nothing": ("requirements.lock", "\nmlflow==", "\nmlflow==9."),
    "latency measurement": ("src/exporting/latency.py", "import time", "import time\n\nx = 1"),
}
# What is edited, how, and the stages that run again.
TABLE: dict[str, tuple[Edit, frozenset[str]]] = {
    "colour": (
        ("src/reporting/plots.py", 'SAMPLE_NOTE = "', 'SAMPLE_NOTE = "*'),
        stages("evaluate") | stages("describe", of=DATA),
    ),
    "page of the data report": (
        ("src/describing/page.py", "CLASSES = 30", "CLASSES = 31"),
        stages("describe", of=DATA),
    ),
    "description of texts": (
        ("src/describing/kinds/text.py", "EXCERPT = 280", "EXCERPT = 281"),
        stages("describe", of=IMDB),
    ),
    "metric of a task": (
        ("src/tasks/classification.py", "TASK = ", "x = 1\nTASK = "),
        stages("evaluate", "export", of=RESNET + LSTM),
    ),
    "model card": (("src/exporting/card.py", "## Limits", "## Known limits"), stages("export")),
    "layer of the LSTM": (
        ("src/models/lstm.py", "nn.Dropout(dropout)", "nn.Dropout(dropout / 2)"),
        stages(*ALL, of=LSTM),
    ),
    "optimizer": (("src/models/optimization.py", "def rate_factor(", "x = 1\n\ndef rate_factor("), stages(*ALL)),
    "augmentation": (("src/data/augmentation.py", ".round()", ".floor()"), stages(*ALL, of=RESNET + PIX2PIX)),
    "seed rule of the loader": (("src/data/batching.py", "digest_size=8", "digest_size=16"), stages(*ALL)),
    "hardware": (("src/common/hardware.py", 'device.type == "cpu" and', 'device.type != "cuda" and'), stages(*ALL)),
    "parser of a data set": (
        ("src/data/sets/imdb.py", '(".txt",)', '("txt",)'),
        stages("preprocess", of=("imdb",)),
    ),
    "drawing of a sample": (
        ("src/data/samples/reviews.py", "\n\n\ndef ", "\n\n\nx = 1\n\n\ndef "),
        stages("download", of=IMDB),
    ),
    "packed splits": (
        ("src/data/packed.py", "def stratified_holdout(", "x = 1\n\n\ndef stratified_holdout("),
        stages("preprocess", "describe", of=DATA) | stages(*ALL),
    ),
    "weights that training begins with": (
        ("conf/experiment/imdb_lstm.yaml", "name: imdb_lstm", "name: imdb_lstm\ninit_from: a_run"),
        stages("weights", of=LSTM),
    ),
    "learning rate": (("conf/model/lstm.yaml", "lr: ", "lr: 1"), stages(*ALL, of=LSTM)),
    "version of torch": (("requirements.lock", "\ntorch==", "\ntorch==9."), stages(*ALL)),
    "byte of an archive": (
        ("data/raw/sample/imdb/source.json", '"bytes": ', '"bytes": 1'),
        stages("download", "preprocess", of=("imdb",)),
    ),
}


def ask(clone: Path, changes: list[list[Edit]]) -> list[dict[str, Any]]:
    """The stages that would run again, and the keys of the trainings, after each change."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reruns"],
        cwd=clone,
        env=commands_environment(),
        input=json.dumps(changes),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def answers(repro: str, clone: Path) -> dict[str, dict[str, Any]]:  # noqa: F811
    """What DVC answers without an edit, after all edits without effect at once, and after each of the table's."""
    changes = {"none": [], "without effect": list(WITHOUT_EFFECT.values())} | {name: [TABLE[name][0]] for name in TABLE}
    return dict(zip(changes, ask(clone, list(changes.values())), strict=True))


def test_an_unchanged_clone_runs_nothing(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["none"]["stages"] == []


def test_edits_without_effect_rerun_no_stage_and_restart_no_training(
    answers: dict[str, dict[str, Any]], clone: Path
) -> None:
    effective = []
    if answers["without effect"] != answers["none"]:  # which edit is it?
        alone = ask(clone, [[edit] for edit in WITHOUT_EFFECT.values()])
        effective = [name for name, answer in zip(WITHOUT_EFFECT, alone, strict=True) if answer != answers["none"]]
    assert (answers["without effect"], effective) == (answers["none"], [])


@pytest.mark.parametrize("name", TABLE)
def test_an_edit_reruns_the_stages_whose_result_could_differ(name: str, answers: dict[str, dict[str, Any]]) -> None:
    assert answers[name]["stages"] == sorted(TABLE[name][1])


@pytest.mark.parametrize("name", TABLE)
def test_an_interrupted_training_is_resumed_unless_its_result_could_differ(
    name: str, answers: dict[str, dict[str, Any]]
) -> None:
    before, after = answers["none"]["training"], answers[name]["training"]
    changed = {experiment for experiment in before if before[experiment] != after[experiment]}
    expected = {stage.partition("@")[2] for stage in TABLE[name][1] if stage.startswith("train@")}
    if TABLE[name][0][0] == "requirements.lock":  # for a run in progress the installed versions count
        expected = set()
    assert changed == expected
