"""The detection task: average precision as pycocotools counts it, errors by kind, answers in the photo's own pixels."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from src.common.errors import Failure
from src.data.kinds.boxes import KIND, Placement
from src.scoring.detections import Objects, difference, verdicts
from src.tasks import Request
from src.tasks.detection import TASK, DetectionOptions, Example, average_precision, report
from tests.conftest import Run
from tests.test_runs import output_of

Rows = list[tuple[Any, ...]]

# By image: objects (class, x1, y1, x2, y2, crowd) and detections (class, score, x1, y1, x2, y2).
CASE: list[tuple[Rows, Rows]] = [
    (
        [(0, 10, 10, 50, 50, 0), (1, 60, 60, 180, 180, 0), (0, 100, 10, 120, 30, 0)],
        [
            (0, 0.9, 12, 10, 50, 52),  # a hit
            (0, 0.8, 10, 12, 52, 50),  # the same once more
            (1, 0.7, 70, 80, 180, 185),  # a hit up to an overlap of 75 %
            (0, 0.3, 300, 300, 340, 340),  # nothing there
        ],
    ),
    ([], [(1, 0.6, 5, 5, 40, 60)]),
    ([(0, 0, 0, 200, 200, 1), (0, 220, 220, 250, 250, 0)], [(0, 0.95, 20, 20, 60, 60), (0, 0.5, 221, 219, 250, 251)]),
    ([(1, 5, 5, 25, 25, 0)], []),
]


def objects(rows: Rows) -> Objects:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Objects.annotated(table[:, 1:5], table[:, 0].astype(int), table[:, 5] > 0)


def found(rows: Rows) -> Objects:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Objects.found(table[:, 2:], table[:, 1], table[:, 0].astype(int))


def examples(case: list[tuple[Rows, Rows]]) -> list[Example]:
    made = []
    for index, (there, seen) in enumerate(case):
        annotated = objects(there)
        areas = (annotated.boxes[:, 2:] - annotated.boxes[:, :2]).prod(1)
        made.append(Example(index, found(seen), annotated, areas))
    return made


def coco_statistics(case: list[tuple[Rows, Rows]]) -> np.ndarray:
    """The twelve figures of COCO's own evaluation."""
    rows: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": i} for i in (1, 2)]}
    results = []
    for image, (there, seen) in enumerate(case, 1):
        rows["images"].append({"id": image})
        for label, x1, y1, x2, y2, crowd in there:
            box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
            number = len(rows["annotations"]) + 1
            one = {"id": number, "image_id": image, "category_id": label + 1, "bbox": box, "area": area}
            rows["annotations"].append(one | {"iscrowd": crowd})
        for label, score, x1, y1, x2, y2 in seen:
            one = {"image_id": image, "category_id": label + 1, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(one)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = rows
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


# --- average precision ------------------------------------------------------------------------------------------------


def test_average_precision_is_that_of_pycocotools() -> None:
    figures = average_precision(examples(CASE))
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    names += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]
    np.testing.assert_allclose([float(figures[name]) for name in names], coco_statistics(CASE), atol=1e-6)


def test_average_precision_of_a_case_counted_by_hand() -> None:
    """Class 0: the crowd takes its detection out; of three objects two are found, before and after a double.

    Precision is 1 up to a recall of 1/3 (34 of 101 points), and 2/3 up to 2/3 (33 points). Class 1: the best detection
    finds one of two objects (51 points), and only up to an overlap of 75 %.
    """
    figures = average_precision(examples(CASE))
    expected = ((34 + 33 * 2 / 3) / 101 + 51 / 101) / 2
    assert float(figures["map_50"]) == pytest.approx(expected, abs=1e-6)


def test_a_difficult_object_is_neither_hit_nor_miss() -> None:
    there = [(0, 10, 10, 50, 50, 0), (0, 100, 100, 140, 140, 1)]
    seen: Rows = [(0, 0.9, 10, 10, 50, 50), (0, 0.95, 101, 100, 140, 140)]
    assert float(average_precision(examples([(there, seen)]))["map"]) == pytest.approx(1)
    assert float(average_precision(examples([(there, seen[:1])]))["map"]) == pytest.approx(1)


# --- empty pictures, one object, hundreds -----------------------------------------------------------------------------


def evaluated(case: list[tuple[Rows, Rows]], folder: Path) -> Any:
    split = {
        "images": torch.full((len(case), 3, 64, 96), 90, dtype=torch.uint8),
        "sizes": torch.tensor([[400, 600]] * len(case)),
    }
    meta = {"classes": ["cat", "dog"], "shape": [3, 64, 96], "fit": "letterbox"}
    return report(examples(case), split, meta, DetectionOptions(), folder, {"label": "test", "sample": True})


HUNDREDS: Rows = [(0, 20 * x, 20 * y, 20 * x + 15, 20 * y + 15, 0) for x in range(25) for y in range(12)]


@pytest.mark.parametrize(
    ("case", "figures"),
    [
        ([([], [])], {"map": float("nan"), "missed": 0, "invented": 0, "objects": 0}),
        ([([], [(0, 0.9, 1, 1, 9, 9)])], {"map": float("nan"), "invented": 1, "objects": 0}),
        ([([(1, 10, 10, 50, 50, 0)], [])], {"map": 0.0, "missed": 1, "objects": 1}),
        ([([(1, 10, 10, 50, 50, 0)], [(1, 0.9, 10, 10, 50, 50)])], {"map": 1.0, "map_medium": 1.0, "missed": 0}),
        # COCO counts the best hundred detections of an image: a recall of a third.
        (
            [(HUNDREDS, [(c, 1 - i / 1000, *box) for i, (c, *box, _) in enumerate(HUNDREDS)])],
            {"map": 34 / 101, "recall": 1 / 3, "missed": 0, "objects": 300, "map_small": 34 / 101},
        ),
    ],
    ids=["empty picture", "empty picture with a detection", "one missed", "one found", "hundreds"],
)
def test_pictures_without_with_one_and_with_hundreds_of_objects(
    case: list[tuple[Rows, Rows]], figures: dict[str, float], tmp_path: Path
) -> None:
    measured = evaluated(case, tmp_path)
    for name, value in figures.items():
        assert measured.metrics[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    for name in ("precision_recall", "errors", "detections"):
        assert Image.open(tmp_path / f"{name}.png").width == 960


def test_the_report_tells_each_class_and_each_kind_of_error(tmp_path: Path) -> None:
    measured = evaluated(CASE, tmp_path)
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [(row["class"], row["objects"], row["found"]) for row in rows] == [("cat", "3", "2"), ("dog", "2", "1")]
    assert [float(row["ap50"]) for row in rows] == pytest.approx([(34 + 22) / 101, 51 / 101], abs=1e-4)
    kinds = {row["kind"]: int(row["count"]) for row in csv.DictReader((tmp_path / "errors.csv").open())}
    assert kinds == {"found": 3, "missed": 2, "invented": 1, "doubled": 1, "misplaced": 0, "misnamed": 0}
    assert Counter((pair["actual"], pair["predicted"]) for pair in measured.pairs) == {
        ("cat", "cat"): 3,
        ("dog", "dog"): 1,
        ("cat", "nothing"): 1,
        ("dog", "nothing"): 1,
        ("nothing", "dog"): 1,
    }


# --- errors -----------------------------------------------------------------------------------------------------------


def kinds_of(there: Rows, seen: Rows) -> list[str]:
    return [verdict.kind for verdict in verdicts(found(seen), objects(there))]


CAT = (0, 0, 0, 40, 40, 0)


@pytest.mark.parametrize(
    ("there", "seen", "kinds"),
    [
        ([CAT], [(0, 0.9, 0, 0, 40, 38)], ["found"]),
        ([CAT], [], ["missed"]),
        ([CAT], [(0, 0.9, 100, 100, 140, 140)], ["invented", "missed"]),
        ([CAT], [(0, 0.9, 0, 0, 40, 40), (0, 0.8, 0, 0, 38, 40)], ["found", "doubled"]),
        ([CAT], [(0, 0.9, 20, 0, 60, 40)], ["misplaced"]),
        ([CAT], [(1, 0.9, 0, 0, 40, 40)], ["misnamed"]),
        ([CAT], [(1, 0.9, 20, 0, 60, 40)], ["invented", "missed"]),
        ([CAT, (0, 2, 0, 42, 40, 0)], [(0, 0.9, 0, 0, 40, 40), (0, 0.8, 0, 0, 40, 40)], ["found", "found"]),
        ([(0, 0, 0, 200, 200, 1)], [(0, 0.9, 20, 20, 40, 40)], []),
        ([(0, 0, 0, 200, 200, 1)], [(1, 0.9, 20, 20, 40, 40)], ["invented"]),
    ],
)
def test_each_detection_and_each_missed_object_is_judged_once(there: Rows, seen: Rows, kinds: list[str]) -> None:
    assert kinds_of(there, seen) == kinds


# --- two engines ------------------------------------------------------------------------------------------------------


def differ(first: Rows, second: Rows) -> float:
    return difference(found(first), found(second), size=100, suppression=0.5, tolerance=1e-3)


def test_another_order_of_equal_scores_is_no_difference() -> None:
    first: Rows = [(0, 0.8, 0, 0, 40, 40), (1, 0.8, 50, 50, 90, 90)]
    assert differ(first, first[::-1]) == 0


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([(0, 0.8, 0, 0, 40, 40), (0, 0.5, 60, 0, 90, 40)], 0.0),
        ([(0, 0.8, 0, 0, 41, 40), (0, 0.5, 60, 0, 90, 40)], 0.01),
        ([(0, 0.6, 0, 0, 40, 40), (0, 0.5, 60, 0, 90, 40)], 0.2),
        ([(0, 0.5, 60, 0, 90, 40)], 0.8),
        ([(1, 0.8, 0, 0, 40, 40), (0, 0.5, 60, 0, 90, 40)], 0.8),
        ([(0, 0.8, 0, 0, 40, 40)], 0.0),  # the other one is the last of those that are kept
    ],
)
def test_what_only_one_engine_finds_is_a_difference(second: Rows, expected: float) -> None:
    first: Rows = [(0, 0.8, 0, 0, 40, 40), (0, 0.5, 60, 0, 90, 40)]
    if len(second) == 1 and expected == 0:
        first[1] = (0, 0.8, 60, 0, 90, 40)
    assert differ(first, second) == pytest.approx(expected, abs=1e-6)


def test_a_box_at_the_threshold_of_suppression_is_no_difference() -> None:
    kept = (0, 0.8, 0, 0, 40, 40)
    borderline, other = (0, 0.7, 0, 0, 40, 20), (0, 0.1, 60, 60, 90, 90)
    assert differ([kept, borderline, other], [kept, other]) == 0
    assert differ([kept, (0, 0.7, 0, 0, 40, 12), other], [kept, other]) == pytest.approx(0.7)


# --- answers ----------------------------------------------------------------------------------------------------------

SIGNATURE = {"name": "cats", "kind": "boxes", "classes": ["cat", "dog"], "shape": [3, 100, 100], "score": 0.4}


def answer_of(fit: str, packed: np.ndarray, folder: Path) -> Any:
    Image.new("RGB", (200, 50), (10, 20, 30)).save(folder / "photo.png")
    outputs = [packed[None], np.array([[0.9, 0.3]], np.float32), np.array([[1, 0]]), np.array([2])]
    request = Request(source=str(folder / "photo.png"))
    return TASK.decode(outputs, request, SIGNATURE | {"fit": fit})


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_boxes_are_given_in_the_photo_s_own_pixels(fit: Any, tmp_path: Path) -> None:
    original = np.array([[20, 10, 120, 40], [0, 0, 9, 9]], np.float32)
    packed = Placement.of(200, 50, (100, 100), fit).to_packed(original)
    answer = answer_of(fit, packed, tmp_path)
    (row,) = answer.rows
    assert row == {"class": "dog", "score": 0.9, "x1": 20.0, "y1": 10.0, "x2": 120.0, "y2": 40.0}
    assert answer.lines == [" 90.00%  dog  20,10 to 120,40"]
    assert answer.picture.shape == (50, 200, 3)
    changed = (answer.picture != (10, 20, 30)).any(-1)
    assert changed[10, 100] and changed[39, 60] and changed[25, 20] and changed[25, 119]
    assert not changed[25, 60] and not changed[45, 150]


def test_nothing_found_is_said() -> None:
    empty = np.zeros((1, 5, 4), np.float32), np.zeros((1, 5), np.float32), np.full((1, 5), -1), np.array([0])
    folder = Path(__file__).parent.parent / "docs" / "images"
    source = str(next(folder.glob("*.png")))
    answer = TASK.decode(list(empty), Request(source=source), SIGNATURE | {"fit": "stretch"})
    assert (list(answer.lines), answer.rows) == (["no object found"], [])


@pytest.mark.parametrize("source", [None, "no/such/photo.jpg", "photo\0.jpg"])
def test_a_photo_that_is_not_there_is_refused(source: str | None) -> None:
    with pytest.raises(Failure):
        KIND.read(source, SIGNATURE | {"fit": "stretch"})


# --- the commands -----------------------------------------------------------------------------------------------------

TINY = (
    "data.size=[64,64]",
    "model.network.width=8",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.limit_test_batches=1",
    "trainer.threads=1",
    "export.latency_seconds=0.02",
    "export.latency_batches=[1]",
    "export.int8=true",
    "model.score=0.001",
    "evaluation.score=0.001",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_detector_goes_through_all_stages(clone: Path, run: Run) -> None:
    output = output_of(run("python", "-m", "src.train", "+experiment=bccd_ssd", *TINY).stdout)
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"../{output}", "-cn", "config")
    metrics = json.loads((clone / output / "metrics.json").read_text())
    assert {"map", "ap50", "ap75", "recall", "missed", "objects"} <= set(metrics)
    assert (clone / output / "progress").is_dir()

    Image.new("RGB", (300, 100), (200, 80, 60)).save(clone / "photo.jpg")
    call = ("python", "-X", "importtime", "-m", "src.predict", f"{output}/export", "photo.jpg")
    done = run(*call, "--output", "boxes.png", "--format", "json")
    assert "| torch\n" not in done.stderr
    *rows, picture = json.loads(done.stdout)["answers"]
    assert picture == {"picture": "boxes.png"}
    assert Image.open(clone / "boxes.png").size == (300, 100)
    assert rows and all(0 <= row["x1"] <= row["x2"] <= 300 and 0 <= row["y1"] <= row["y2"] <= 100 for row in rows)
    assert run(*call[:1], *call[3:], "--format", "csv").stdout.startswith("input,class,score,x1,y1,x2,y2\n")
