"""The user's way: `python -m src.new` on every layout, and the commands of docs/your-data.md as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src import new
from src.common.errors import ConfigError, Failure
from src.common.paths import CONF, ROOT
from src.configuration.composing import compose
from src.configuration.describing import conf_comments, keys_of
from src.data.layouts import Files, Layout, recognise
from tests.conftest import run_in

RANDOM = np.random.default_rng(0)


def picture(path: Path, width: int = 16, height: int = 16, brightness: int | None = None) -> None:
    """A picture of noise; grey around a brightness."""
    shape = (height, width, 3) if brightness is None else (height, width)
    low, high = (0, 255) if brightness is None else (brightness - 30, brightness + 30)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(low, high, shape).astype(np.uint8)).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def class_folders(folder: Path) -> None:
    for number in range(40):
        picture(folder / ("robin", "sparrow")[number % 2] / f"{number // 2}.jpg", brightness=60 + 130 * (number % 2))


def split_folders(folder: Path) -> None:
    for number in range(12):
        picture(folder / ("train", "test")[number % 3 == 0] / "ab"[number % 2] / f"{number}.png", 300, 256)


def manifest(folder: Path) -> None:
    rows = [(f"photos/{i}.png", ("cat", "dog")[i % 2], f"patient {i // 4}") for i in range(16)]
    for name, _, _ in rows:
        picture(folder / name)
    pd.DataFrame(rows, columns=["path", "species", "patient"]).to_csv(folder / "labels.csv", index=False)


def side_by_side(folder: Path) -> None:
    for number in range(6):
        picture(folder / ("train", "test")[number % 3 == 0] / f"{number}.png", 128, 64)


def two_folders(folder: Path) -> None:
    for number in range(6):
        picture(folder / "A" / f"{number}.png", 64, 64)
        picture(folder / "B" / f"{number}.jpg", 64, 64)


def domains(folder: Path) -> None:
    for number in range(12):
        picture(folder / f"{('train', 'test')[number % 3 == 0]}{'AB'[number % 2]}" / f"{number}.png", 64, 64)


def coco(folder: Path) -> None:
    for split in ("train", "valid"):
        picture(folder / split / "0.jpg", 200, 100)
        images = [{"id": 0, "file_name": "0.jpg", "width": 200, "height": 100}]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
        text(folder / split / "_annotations.coco.json", json.dumps(content))


def yolo(folder: Path) -> None:
    for split in ("train", "val"):
        picture(folder / "images" / split / "0.jpg", 200, 100)
        text(folder / "labels" / split / "0.txt", "0 0.5 0.5 0.2 0.2\n")
    text(folder / "data.yaml", "names: [cell]\n")


def text_folders(folder: Path) -> None:
    for number in range(12):
        text(folder / ("train", "test")[number % 3 == 0] / "ab"[number % 2] / f"{number}.txt", "some words " * number)


def conll(folder: Path) -> None:
    for split in ("train", "test"):
        text(folder / f"{split}.txt", "Ada NNP B-PER\nlives VBZ O\n\nin IN O\nRome NNP B-LOC\n\n")


REVIEWS = pd.DataFrame(
    {
        "id": range(40),
        "verdict": ["good", "bad"] * 20,
        "review": [f"a film that is number {i}, to be seen" for i in range(40)],
        "split": ["train"] * 30 + ["test"] * 10,
    }
)


def text_table(folder: Path) -> None:
    REVIEWS.to_json(folder / "reviews.jsonl", orient="records", lines=True)


def text_tables(folder: Path) -> None:
    REVIEWS[:30].drop(columns="split").to_parquet(folder / "train-0000.parquet")
    REVIEWS[30:].drop(columns="split").to_parquet(folder / "test-0000.parquet")


def text_table_without_header(folder: Path) -> None:
    REVIEWS[["verdict", "review"]].replace({"good": 1, "bad": 2}).to_csv(folder / "r.csv", index=False, header=False)


def numbers(folder: Path) -> None:
    pd.DataFrame(RANDOM.normal(size=(50, 3)), columns=["x", "y", "z"]).to_csv(folder / "t.csv", index=False)


COLUMNS = {"text": "review", "label": "verdict"}
LAYOUTS: list[tuple[Callable[[Path], None], str, dict[str, dict[str, int]], dict[str, Any]]] = [
    (class_folders, "images", {"": {"robin": 20, "sparrow": 20}}, {}),
    (split_folders, "images", {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}}, {}),
    (
        manifest,
        "images",
        {"": {"cat": 8, "dog": 8}},
        {"manifest": "labels.csv", "columns": {"file": "path", "label": "species", "group": "patient"}},
    ),
    (side_by_side, "pairs", {"train": {"": 4}, "test": {"": 2}}, {}),
    (two_folders, "pairs", {"": {"": 6}}, {}),
    (domains, "domains", {"train": {"A": 4, "B": 4}, "test": {"A": 2, "B": 2}}, {}),
    (coco, "boxes", {"train": {"": 1}, "val": {"": 1}}, {}),
    (yolo, "boxes", {"train": {"": 1}, "val": {"": 1}}, {}),
    (text_folders, "texts", {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}}, {}),
    (conll, "entities", {"train": {"": 3}, "test": {"": 3}}, {}),
    (
        text_table,
        "text_table",
        {"train": {"good": 15, "bad": 15}, "test": {"good": 5, "bad": 5}},
        {"columns": COLUMNS | {"split": "split"}},
    ),
    (
        text_tables,
        "text_table",
        {"train": {"good": 15, "bad": 15}, "test": {"good": 5, "bad": 5}},
        {"columns": COLUMNS},
    ),
    (text_table_without_header, "text_table", {"": {"1": 20, "2": 20}}, {"columns": {"text": 1, "label": 0}}),
    (numbers, "numbers", {"": {"": 50}}, {}),
]


def layouts_of(folder: Path) -> list[Layout]:
    return recognise(Files(folder))


@pytest.mark.parametrize(("make", "name", "counts", "keys"), LAYOUTS, ids=[make.__name__ for make, *_ in LAYOUTS])
def test_a_layout_is_recognised_with_its_splits_and_classes(
    make: Callable[[Path], None], name: str, counts: dict[str, dict[str, int]], keys: dict[str, Any], tmp_path: Path
) -> None:
    make(tmp_path)
    first = layouts_of(tmp_path)[0]
    assert first.name == name
    assert {split: dict(classes) for split, classes in first.counts.items()} == counts
    assert first.keys == keys


@pytest.fixture
def configuration(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a data set whose files are removed afterwards."""
    name = "tested_data_of_a_user"
    yield name
    for group in ("data", "experiment", "sweep"):
        (CONF / group / f"{name}.yaml").unlink(missing_ok=True)


@pytest.mark.parametrize("make", [make for make, *_ in LAYOUTS], ids=[make.__name__ for make, *_ in LAYOUTS])
def test_what_is_written_for_a_layout_composes_with_a_model_that_takes_it(
    make: Callable[[Path], None], tmp_path: Path, configuration: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    new.new_data(configuration, str(tmp_path), ["split_seed=3"])
    config = compose([f"experiment={configuration}", "output=out"])
    assert config.profile.name == "full"
    assert config.plain()["data"]["split_seed"] == 3
    assert config.data.archive == str(tmp_path)
    comments = conf_comments({"data": configuration})
    keys = (key for key, _, field, _ in keys_of(config, "") if not field.description)
    assert [key for key in keys if key.startswith("data.") and key not in comments] == []
    assert layouts_of(tmp_path)[0].title in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"conf/data/{configuration}.yaml exists: give another name, or remove it"):
        new.new_data(configuration, str(tmp_path), [])


def test_another_layout_and_other_keys_can_be_named(tmp_path: Path, configuration: str) -> None:
    manifest(tmp_path)
    columns = "columns={text: path, label: species}"
    new.new_data(configuration, str(tmp_path), ["layout=text_table", columns, "loader.batch_size=3"])
    data = compose([f"experiment={configuration}", "output=out"]).plain()["data"]
    assert data["_target_"] == "src.data.sets.text_tables.TextTables"
    assert data["columns"] == {"text": "path", "label": "species", "split": None, "group": None}
    assert data["loader"]["batch_size"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout=boxes"], "layout=boxes does not fit; what fits: images"),
        (["size=-1"], "data.size: -1"),
        (["sise=8"], "data.sise"),
        (["size"], "size: give key=value"),
        (["layout=nothing"], "no known layout; what fits: images"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    overrides: list[str], message: str, tmp_path: Path, configuration: str
) -> None:
    class_folders(tmp_path)
    with pytest.raises(Failure) as error:
        new.new_data(configuration, str(tmp_path), overrides)
    assert message in str(error.value)
    assert not [*CONF.glob(f"*/{configuration}.yaml")]


def test_data_without_a_known_layout_is_refused(tmp_path: Path, configuration: str) -> None:
    text(tmp_path / "notes.md", "nothing")
    with pytest.raises(Failure, match="no known layout; the layouts are in docs/your-data"):
        new.new_data(configuration, str(tmp_path), [])
    with pytest.raises(Failure, match="no such file or folder"):
        new.new_data(configuration, str(tmp_path / "nowhere"), [])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_commands_of_the_page_lead_from_a_folder_to_a_model_that_answers(clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    subprocess.run(["git", "clone", "--quiet", str(clone), str(folder)], check=True)
    class_folders(tmp_path / "data" / "birds")
    page = (ROOT / "docs" / "your-data.md").read_text()
    block = re.search(r"## \w+ commands\n\n```sh\n(.*?)```", page, re.DOTALL)
    assert block
    commands = [shlex.split(line.replace("~", str(tmp_path)), comments=True) for line in block[1].splitlines()]
    assert len(commands) <= 10
    outputs = [run_in(folder, *command, timeout=400).stdout for command in commands]
    (answer,) = (out for command, out in zip(commands, outputs, strict=True) if command[2] == "src.predict")
    assert "robin" in answer
    assert (folder / "data" / "direct" / "reports" / "full" / "birds" / "report.html").is_file()
    (comparison,) = (out for command, out in zip(commands, outputs, strict=True) if command[2] == "src.compare")
    assert "src.models.perceptron" in comparison or "mlp" in comparison
    assert (folder / "experiments" / "birds" / "export" / "model.onnx").is_file()
    assert (folder / "experiments" / "sweeps" / "birds-full" / "best.yaml").is_file()
    text(
        folder / "conf" / "data" / "birds.yaml", (folder / "conf" / "data" / "birds.yaml").read_text() + "# a comment\n"
    )
    again = run_in(folder, "dvc", "repro", "export@birds", timeout=400).stdout
    assert "train@birds' didn't change" in again


@pytest.mark.slow
def test_texts_in_a_table_are_trained_exported_and_called_with_learned_subwords(clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    subprocess.run(["git", "clone", "--quiet", str(clone), str(folder)], check=True)
    frame = pd.DataFrame([(f"a {('good', 'bad')[i % 2]} film, {i} times", "+-"[i % 2]) for i in range(120)])
    frame.columns = ["text", "label"]
    frame.to_csv(tmp_path / "films.csv", index=False)
    where = ["hydra.run.dir=experiments/runs/films/first", "tracking=false"]
    python = ["python", "-m"]
    run_in(folder, *python, "src.new", "data", "films", str(tmp_path / "films.csv"), "tokenizer=bpe", "vocabulary=300")
    run_in(folder, *python, "src.train", "+experiment=films", *where)
    run_in(folder, *python, "src.export", "-cp", "../experiments/runs/films/first", "-cn", "config")
    answer = run_in(
        folder, *python, "src.predict", "experiments/runs/films/first/export", "a GOOD film, 7 times"
    ).stdout
    assert answer.splitlines()[0].endswith("+"), answer
