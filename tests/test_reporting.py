"""Pictures, tables and the model card, checked by their content and their bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src import tasks
from src.data import kinds
from src.exporting.card import Card, model_card
from src.reporting import plots, tables
from src.scoring.calibration import calibration_bins, calibration_error

CLASSES = ["cat", "dog", "ship"]
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
CONFIDENCE = RANDOM.random(200)
CORRECT = RANDOM.random(200) < CONFIDENCE
HISTORY: list[dict[str, float]] = [
    {"epoch": 0, "train_loss": 2.0, "val_loss": 2.1, "val_accuracy": 0.3, "lr": 0.1},
    {"epoch": 1, "train_loss": 1.0, "val_loss": float("nan"), "lr": 0.05},
    {"epoch": 2, "train_loss": float("inf"), "val_loss": 1.2, "val_accuracy": 0.6, "lr": 0.0001},
]
GAN = [{"epoch": 0, "train_generator_loss": 9.0, "train_discriminator_loss": 0.7, "train_l1": 0.3, "val_l1": 0.4}]
METRICS = tasks.load("classification").metrics
BINS = calibration_bins(CONFIDENCE, CORRECT)
LATENCY: list[dict[str, float]] = [
    {"batch": 1, "pytorch_ms": 12.9, "onnxruntime_ms": 6.3},
    {"batch": 32, "pytorch_ms": 75, "onnxruntime_ms": 87},
]

PICTURES: dict[str, Callable[..., None]] = {
    "curves": partial(plots.curves, HISTORY, METRICS),
    "gan curves": partial(plots.curves, GAN, tasks.load("translation").metrics),
    "confusion": partial(plots.confusion_matrix, np.array([[5, 1, 0], [2, 3, 0], [0, 0, 0]]), CLASSES),
    "many classes": partial(plots.confusion_matrix, np.eye(40, dtype=int), [str(index) for index in range(40)]),
    "reliability": partial(plots.reliability_diagram, BINS, calibration_error(BINS)),
    "mistakes": partial(plots.mistakes, IMAGES, [{"predicted": "cat", "confidence": 0.98, "true": "$dog"}] * 6),
    "grey mistakes": partial(plots.mistakes, IMAGES[..., :1], [{"predicted": "a", "confidence": 0.5, "true": "b"}] * 6),
    "no mistakes": partial(plots.mistakes, IMAGES[:0], []),
    "grid": partial(plots.image_grid, {"input": IMAGES, "output": 255 - IMAGES}),
    "latent plane": partial(plots.latent_plane, RANDOM.normal(size=(30, 2)), np.arange(30) % 3, CLASSES),
    "latency": partial(plots.latency, LATENCY),
    "latency in int8": partial(plots.latency, [row | {"int8_ms": row["onnxruntime_ms"] / 3} for row in LATENCY]),
}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_a_picture_is_reproducible_and_carries_a_visible_sample_note(draw: Callable[..., None], tmp_path: Path) -> None:
    first, again, full = tmp_path / "first.png", tmp_path / "again.png", tmp_path / "full.png"
    draw(first, label="experiment", sample=True)
    draw(again, label="experiment", sample=True)
    draw(full, label="experiment", sample=False)
    assert first.read_bytes() == again.read_bytes()
    assert not Image.open(first).info.keys() & {"Software", "Creation Time", "date:create"}
    height, width, _ = pixels(first).shape
    assert width == 960 and 60 < height < 1300
    rows, columns = np.nonzero((pixels(first) != pixels(full)).any(axis=-1))
    assert columns.min() > width / 2 and rows.max() < 60, "the note is in the right half of the header"
    assert columns.max() - columns.min() > 150, "the note is large enough to read"


def test_the_label_is_drawn_in_the_header(tmp_path: Path) -> None:
    for name, label in (
        ("a", "cifar10_resnet · profile full · seed 1"),
        ("b", "cifar10_resnet · profile full · seed 2"),
    ):
        plots.latency(LATENCY, tmp_path / name, label=label, sample=False)
    changed = np.nonzero((pixels(tmp_path / "a") != pixels(tmp_path / "b")).any(axis=-1))
    assert changed[0].size and changed[0].max() < 75


def test_a_picture_ignores_the_users_matplotlibrc_and_keeps_it(tmp_path: Path) -> None:
    import matplotlib

    plots.curves(HISTORY, METRICS, tmp_path / "a.png", label="x", sample=False)
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "lines.linewidth": 9}):
        plots.curves(HISTORY, METRICS, tmp_path / "b.png", label="x", sample=False)
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_curves_skip_missing_and_non_finite_values(tmp_path: Path) -> None:
    holes: list[dict[str, float]] = [
        {"epoch": 0, "loss": 2.0},
        {"epoch": 1, "loss": math.nan},
        {"epoch": 2},
        {"epoch": 3, "loss": 1.0},
    ]
    plots.curves(holes, METRICS, tmp_path / "holes.png", label="x", sample=False)
    # The headline counts four epochs; below it, the line connects the two finite points.
    complete = [{"epoch": 0, "loss": 2.0}, {"epoch": 3, "loss": 1.0}]
    plots.curves(complete, METRICS, tmp_path / "complete.png", label="x", sample=False)
    assert np.array_equal(pixels(tmp_path / "holes.png")[75:], pixels(tmp_path / "complete.png")[75:])


def test_a_history_without_finite_values_is_drawn(tmp_path: Path) -> None:
    plots.curves([{"epoch": 0, "train_loss": math.nan}], METRICS, tmp_path / "nan.png", label="x", sample=False)
    assert pixels(tmp_path / "nan.png").shape[1] == 960


@pytest.mark.parametrize("history", [[], [{"epoch": 0}]])
def test_a_history_without_metrics_is_refused_with_the_remedy(history: list[dict[str, float]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"curves\.png.*no metrics.*at least one epoch"):
        plots.curves(history, METRICS, tmp_path / "curves.png", label="x", sample=False)
    assert not (tmp_path / "curves.png").exists()


def test_a_confusion_matrix_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) for 2 classes"):
        plots.confusion_matrix(np.zeros((2, 3), int), ["a", "b"], tmp_path / "c.png", label="x", sample=False)


def test_image_columns_of_different_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must share one shape"):
        plots.image_grid({"input": IMAGES, "output": IMAGES[:2]}, tmp_path / "g.png", label="x", sample=False)


def test_a_tile_shows_the_images_own_colours(tmp_path: Path) -> None:
    halves = np.zeros((1, 8, 8, 3), np.uint8)
    halves[0, :4] = [200, 30, 40]
    halves[0, 4:] = [10, 60, 220]
    plots.image_grid({"input": halves}, tmp_path / "g.png", label="x", sample=False)
    colours = {tuple(colour) for colour in pixels(tmp_path / "g.png").reshape(-1, 3)}
    assert {(200, 30, 40), (10, 60, 220)} <= colours


def test_the_calibration_error_of_two_bins() -> None:
    # Two bins: (0, 0.5] holds 0.2 and 0.5, one right; (0.5, 1] holds 0.6 and 0.9, both right.
    confidence, correct = np.array([0.2, 0.5, 0.6, 0.9]), np.array([False, True, True, True])
    # 2/4 * |1/2 - 0.35| + 2/4 * |1 - 0.75|
    assert calibration_error(calibration_bins(confidence, correct, bins=2)) == pytest.approx(0.2)


def test_calibration_bins_count_each_example_once_and_empty_ones_are_nan() -> None:
    rows = calibration_bins(np.array([0.0, 0.1, 0.1001, 1.0, 1.0000001]), np.ones(5, bool), bins=10)
    assert [row["count"] for row in rows] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert math.isnan(rows[5]["accuracy"]) and rows[9]["accuracy"] == 1
    assert (rows[0]["low"], rows[9]["high"]) == (0, 1)


@pytest.mark.parametrize("confidence", [[], [0.5, math.nan], [1.2], [-0.1]])
def test_calibration_refuses_values_outside_of_zero_to_one(confidence: list[float]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1"):
        calibration_bins(np.array(confidence), np.ones(len(confidence), bool))


def test_importing_plots_and_card_loads_neither_matplotlib_nor_torch() -> None:
    code = "import sys, src.reporting.plots, src.exporting.card; print({'torch', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_csv_has_all_columns_short_floats_and_lf_endings(tmp_path: Path) -> None:
    rows = [
        {"epoch": 0, "loss": 1 / 3, "note": 'a "b", c'},
        {"epoch": 1, "loss": np.float32(0.1), "lr": 1e-5},
        {"epoch": np.int64(2), "loss": math.nan, "lr": 1234567.0},
    ]
    tables.write_csv(tmp_path / "a.csv", rows)
    assert (tmp_path / "a.csv").read_bytes() == (
        b'epoch,loss,note,lr\n0,0.333333,"a ""b"", c",\n1,0.1,,1e-05\n2,,,1234570.0\n'
    )


def test_csv_of_no_rows_is_empty(tmp_path: Path) -> None:
    tables.write_csv(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_bytes() == b""


def test_metrics_are_sorted_and_rounded_and_non_finite_ones_null(tmp_path: Path) -> None:
    metrics = {"test": {"loss": math.nan, "accuracy": np.float64(2 / 3)}, "epochs": np.int64(3), "a": [math.inf, 0.1]}
    tables.write_metrics(tmp_path / "m.json", metrics)
    text = (tmp_path / "m.json").read_text()
    assert text.endswith("}\n") and text.index('"a"') < text.index('"epochs"') < text.index('"test"')
    assert json.loads(text) == {"a": [None, 0.1], "epochs": 3, "test": {"accuracy": 0.666667, "loss": None}}


def test_confusion_pairs_name_the_classes_of_each_example() -> None:
    assert tables.confusion_pairs(np.array([0, 2]), np.array([1, 2]), CLASSES) == [
        {"actual": "cat", "predicted": "dog"},
        {"actual": "ship", "predicted": "ship"},
    ]


def test_a_markdown_table_aligns_numbers_and_escapes_pipes_and_breaks() -> None:
    rows: list[dict[str, object]] = [{"name": "a|b\nc", "value": 0.123456789, "unused": 1}, {"name": "d"}]
    assert tables.markdown(rows, ["name", "value"]) == (
        "| name | value |\n| --- | ---: |\n| a\\|b c | 0.123457 |\n| d |  |\n"
    )


def test_text_mistakes_are_truncated_at_a_word_and_escaped(tmp_path: Path) -> None:
    text = "<b>1.\n*Great* & bad_movie</b> " + "word " * 200
    rows = [{"true": "neg", "predicted": "pos", "confidence": 0.987}]
    tables.text_mistakes([text], rows, tmp_path / "m.md", label="imdb_lstm", sample=True)
    page = (tmp_path / "m.md").read_text()
    assert "## 1. pos 98.7%, is neg" in page and plots.SAMPLE_NOTE in page and "imdb_lstm" in page
    quote = next(line for line in page.splitlines() if line.startswith("> "))
    assert quote.startswith(r"> “&lt;b&gt;1. \*Great\* &amp; bad\_movie&lt;/b&gt; word ")
    assert quote.endswith("word …”") and 590 < len(quote) < 640


def test_a_page_without_text_mistakes(tmp_path: Path) -> None:
    tables.text_mistakes([], [], tmp_path / "m.md", label="x", sample=False)
    assert (tmp_path / "m.md").read_text() == "# The most confident mistakes\n\nx\n\nNone.\n"


CARD = Card(
    title="cifar10_resnet",
    summary="A ResNet for small photos.",
    hub_tag="image-classification",
    dataset="CIFAR-10",
    profile="sample",
    counts={"train": 500, "test": 100},
    source="drawn by this project",
    source_sha256="0" * 64,
    config={"model": {"lr": 0.1, "width": None}, "seed": 7},
    seed=7,
    epochs=12,
    metrics={"accuracy": 0.912345678, "loss": math.nan},
    folder="model",
    arguments="input.png",
    snippet="print(session.run(None, {}))\n",
    files={"model.onnx": "a" * 64},
    limits=["Trained on drawings."],
)


def test_a_card_shows_data_training_metrics_files_and_limits() -> None:
    page = model_card(CARD)
    assert page == model_card(dataclasses.replace(CARD)), "the same fields give the same page"
    for part in (
        "pipeline_tag: image-classification",
        "# cifar10_resnet\n\nA ResNet for small photos.",
        plots.SAMPLE_NOTE,
        "| train | 500 |",
        "sha256 `" + "0" * 64,
        "Seed 7, epochs: 12.",
        "```yaml\nmodel:\n  lr: 0.1\n  width: null\nseed: 7\n```",
        "| accuracy | 0.912346 |\n| loss |  |",
        "python -m src.predict model input.png",
        f"| model.onnx | {'a' * 64} |",
        "* Trained on drawings.\n",
    ):
        assert part in page
    assert plots.SAMPLE_NOTE not in model_card(dataclasses.replace(CARD, profile="full"))


def write_model(hub_tag: str, path: Path) -> None:
    """Writes a model with the inputs and outputs of an exported one: sums as scores, or the image itself."""
    import onnx
    from onnx import TensorProto, helper

    def info(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [info("image", TensorProto.UINT8, "batch", 3, 4, 6)]
    if hub_tag == "image-to-image":
        nodes = [
            helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["real", "white"], ["output"]),
        ]
        output = info("output", TensorProto.FLOAT, "batch", 3, 4, 6)
    elif hub_tag == "image-classification":
        nodes = [
            helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("GlobalAveragePool", ["real"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["output"]),
        ]
        output = info("output", TensorProto.FLOAT, "batch", 3)
    elif hub_tag == "unconditional-image-generation":
        inputs = [info("latent", TensorProto.FLOAT, "batch", 72)]
        nodes = [
            helper.make_node("Sigmoid", ["latent"], ["light"]),
            helper.make_node("Reshape", ["light", "shape"], ["output"]),
        ]
        output = info("output", TensorProto.FLOAT, "batch", 3, 4, 6)
    else:
        inputs = [info("tokens", TensorProto.INT64, "batch", "time"), info("lengths", TensorProto.INT64, "batch")]
        nodes = [
            helper.make_node("Unsqueeze", ["lengths", "one"], ["column"]),
            helper.make_node("Concat", ["column", "tokens"], ["output"], axis=1),
        ]
        output = info("output", TensorProto.INT64, "batch", "scores")
    constants = {
        "white": helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]),
        "one": helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        "shape": helper.make_tensor("shape", TensorProto.INT64, [4], [-1, 3, 4, 6]),
    }
    used = [constants[name] for node in nodes for name in node.input if name in constants]
    graph = helper.make_graph(nodes, "model", inputs, [output], used)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


SNIPPETS = [
    ("classification", "images", {}, ["dog"]),  # green is the strongest channel
    ("classification", "text", {"classes": [f"class {n}" for n in range(5)]}, ["class 3"]),  # 345 is the largest token
    ("translation", "pairs", {}, []),
    ("reconstruction", "images", {}, []),
    ("generation", "images", {"latent": 72}, []),
]


@pytest.mark.parametrize(
    ("name", "kind", "fields", "printed"), SNIPPETS, ids=[f"{case[0]} {case[1]}" for case in SNIPPETS]
)
def test_the_snippet_of_the_card_runs_unchanged(
    name: str, kind: str, fields: dict[str, Any], printed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, signature = tasks.load(name), {"kind": kind, "shape": [3, 4, 6], "classes": CLASSES} | fields
    (tmp_path / "model").mkdir()
    write_model(task.hub_tag(signature), tmp_path / "model" / "model.onnx")
    Image.fromarray(np.full((9, 9, 3), (10, 200, 30), np.uint8)).save(tmp_path / "input.png")
    monkeypatch.chdir(tmp_path)
    page = model_card(dataclasses.replace(CARD, snippet=task.snippet(signature)))
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippet and len(snippet[1].splitlines()) <= 10
    output: list[object] = []
    exec(snippet[1], {"print": output.append})
    assert output == printed
    if not printed:
        picture = Image.open("output.png")
        assert picture.size == (6, 4)
        assert name == "generation" or np.asarray(picture)[0, 0].tolist() == [10, 200, 30]


def test_the_snippet_reads_a_grey_image_as_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(tmp_path / "input.png")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {"np": np}
    exec(kinds.load("images").snippet({"shape": [1, 4, 6]}), variables)
    assert variables["image"].shape == (1, 1, 4, 6)


def test_all_samples_are_drawn(tmp_path: Path) -> None:
    pictures = np.stack([np.full((4, 4, 1), 20 * number, np.uint8) for number in range(1, 11)])
    plots.samples(pictures, tmp_path / "s.png", label="x", sample=True)
    image = np.asarray(Image.open(tmp_path / "s.png").convert("L"))
    assert {20 * number for number in range(1, 11)} <= set(np.unique(image).tolist())

    points = np.random.default_rng(0).normal(size=(30, 2))
    plots.latent_plane(points, np.arange(30) % 3, CLASSES, tmp_path / "l.png", label="x", sample=False)
    plots.latent_plane(points, np.arange(30) % 3, CLASSES, tmp_path / "again.png", label="x", sample=False)
    assert (tmp_path / "l.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_a_file_that_is_a_link_into_a_cache_is_replaced(tmp_path: Path) -> None:
    cached = tmp_path / "cached"
    cached.write_text("old")
    for kind in ("symlink", "hardlink"):
        output = tmp_path / f"{kind}.csv"
        output.symlink_to(cached) if kind == "symlink" else output.hardlink_to(cached)
        tables.write_csv(output, [{"a": 1}])
        assert (output.read_text(), cached.read_text()) == ("a\n1\n", "old")
        assert not output.is_symlink()
