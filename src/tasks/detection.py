"""Detection: the objects of an image, each with a box, a class and a score."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from src.common.pictures import beside
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation, Fraction, PositiveInt
from src.data.batching import limited
from src.data.kinds.boxes import KIND, placement_of, read_picture
from src.reporting import detections, plots, tables
from src.scoring.detections import KINDS, MISSED, Objects, Verdict, confusion, difference, verdicts
from src.tasks import Answer, Evaluated, Request, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.data.batching import Batches

CLASSES_SHOWN = 10  # curves of single classes in one picture, at most
ERRORS_SHOWN = 4  # of each kind
SHOWN_IN_TRAINING = 8
SCORE_SHOWN = 0.4  # smallest one of detections shown during training
SHORT_SIDE = 256  # pixels, at least, of images that boxes are drawn on


class DetectionOptions(Evaluation):
    """What evaluate counts and shows of a detector."""

    score: Fraction = Field(
        default=0.4,
        description="smallest score of a detection that is counted as right or wrong, and that predict shows",
    )
    examples: PositiveInt = Field(default=8, description="images shown, annotated and as detected")


METRICS: Mapping[str, Metric] = {
    "map": Metric("max", "mean average precision", is_fraction=True, is_validated=True),
    "ap50": Metric("max", "AP at overlap 50 %", is_fraction=True, is_validated=True),
    "ap75": Metric("max", "AP at overlap 75 %", is_fraction=True),
    "map_small": Metric("max", "mAP, below 32 x 32 pixels", is_fraction=True),
    "map_medium": Metric("max", "mAP, up to 96 x 96 pixels", is_fraction=True),
    "map_large": Metric("max", "mAP, above 96 x 96 pixels", is_fraction=True),
    "recall": Metric("max", "mean recall of 100 detections", is_fraction=True),
    "loss": Metric("min", "loss", is_validated=True),
    "class_loss": Metric(None, "loss"),
    "box_loss": Metric(None, "loss"),
    **{kind: Metric("min", f"{kind} objects" if kind == MISSED else f"{kind} detections") for kind in KINDS},
    "objects": Metric(None, "objects"),
    "examples": Metric(None, "examples"),
}


@dataclass(frozen=True)
class Example:
    """One image of a split, and its objects, in pixels of the original picture."""

    index: int  # in the split
    found: Objects
    annotated: Objects
    areas: np.ndarray  # float [N], of the annotated objects


class Detection(Task):
    """Objects in an image. A model answers boxes, scores, labels and counts: see `src.models.ssd.SSD.answer`."""

    takes = ("boxes",)
    metrics = METRICS
    options = DetectionOptions
    outputs = ("boxes", "scores", "labels", "counts")

    def evaluate(
        self, model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
    ) -> Evaluated:
        """Also (actual, predicted) of each detection and missed object. Prints images a second. Files: see `report`."""
        options = config.evaluation
        assert isinstance(options, DetectionOptions)
        started = time.perf_counter()
        examples = detected(model, test, config.trainer.limit_test_batches)
        seconds = time.perf_counter() - started
        print(f"{len(examples) / seconds:.1f} images a second, in batches of {test.size}", flush=True)
        return report(
            examples, test.split, meta, options, folder, plots.Title(label=config.label, sample=config.sample)
        )

    def difference(
        self, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], model: Any, tolerance: float
    ) -> float:
        return max(
            difference(some, other, size=max(model.shape), suppression=model.suppression, tolerance=tolerance)
            for some, other in zip(_objects(expected), _objects(actual), strict=True)
        )

    def showcase(self, model: Any, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        import torch

        images, boxes, labels, ignored = (part[:SHOWN_IN_TRAINING] for part in batch)
        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        annotated = [
            Objects.annotated(b[l >= 0], l[l >= 0], i[l >= 0])
            for b, l, i in zip(*(part.cpu().numpy() for part in (boxes, labels, ignored)), strict=True)  # noqa: E741
        ]
        found = [one.above(SCORE_SHOWN) for one in _objects([part.cpu().numpy() for part in model.answer(images)])]
        columns = {"annotated": annotated, "found": found}
        return {
            name: torch.from_numpy(np.stack([_drawn(p, o) for p, o in zip(pictures, column, strict=True)])).permute(
                0, 3, 1, 2
            )
            for name, column in columns.items()
        }

    def signature(self, model: nn.Module, meta: Mapping[str, Any], config: Config) -> dict[str, Any]:
        assert isinstance(config.evaluation, DetectionOptions)
        return KIND.signature(meta, config.loader) | {"score": config.evaluation.score}

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        """Detections in pixels of the original picture, which is read again to draw on it."""
        picture = read_picture(request.source, signature)
        (found,) = _objects(outputs)
        found = found.above(signature["score"])
        boxes = placement_of(signature, *picture.shape[:2]).to_original(found.boxes)
        names = [signature["classes"][label] for label in found.labels]
        rows = [
            {
                "class": name,
                "score": round(float(score), 6),
                **{key: round(float(value), 2) for key, value in zip(("x1", "y1", "x2", "y2"), box, strict=True)},
            }
            for name, score, box in zip(names, found.scores, boxes, strict=True)
        ]
        lines = [
            f"{row['score']:7.2%}  {row['class']}  {row['x1']:.0f},{row['y1']:.0f} to {row['x2']:.0f},{row['y2']:.0f}"
            for row in rows
        ]
        captions = [f"{name} {score:.0%}" for name, score in zip(names, found.scores, strict=True)]
        drawn = detections.draw_boxes(picture, boxes, found.labels.tolist(), captions)
        return Answer(lines or ["no object found"], rows, picture=drawn, file=beside(request.source, signature["name"]))

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return "object-detection"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return f"""\
{KIND.snippet(signature)}boxes, scores, labels, counts = session.run(None, {{"image": image}})
classes = {list(signature["classes"])}
for box, score, label in zip(boxes[0], scores[0], labels[0][: counts[0]]):
    print(f"{{classes[label]}} {{score:.0%}}", box)  # x1, y1, x2, y2 in pixels of `image`
"""


def _objects(outputs: Sequence[np.ndarray]) -> list[Objects]:
    """The detections of each image in a model's outputs."""
    boxes, scores, labels, counts = outputs
    return [
        Objects.found(boxes[row, :count], scores[row, :count], labels[row, :count])
        for row, count in enumerate(counts.tolist())
    ]


def detected(model: Any, batches: Batches, limit: int | float | None = None) -> list[Example]:
    """The detections and objects of a split's images, in pixels of the original pictures."""
    import torch

    split, examples = {key: value for key, value in batches.split.items() if key != "images"}, []
    arrays = {key: value.cpu().numpy() for key, value in split.items()}
    with torch.inference_mode():
        for (images, *_), indices in limited(batches, limit):
            outputs = [output.cpu().numpy() for output in model.answer(images)]
            for index, found in zip(indices.tolist(), _objects(outputs), strict=True):
                placement = placement_of(batches.meta, *arrays["sizes"][index].tolist())
                rows = slice(*arrays["offsets"][index : index + 2])
                ignored = (arrays["crowd"][rows] | arrays["difficult"][rows]).astype(bool)
                annotated = Objects.annotated(
                    placement.to_original(arrays["boxes"][rows]), arrays["labels"][rows], ignored
                )
                found = Objects.found(placement.to_original(found.boxes), found.scores, found.labels)
                examples.append(Example(index, found, annotated, arrays["areas"][rows]))
    return examples


def average_precision(examples: Sequence[Example]) -> dict[str, Any]:
    """COCO's figures, by torchmetrics and pycocotools; crowds and difficult objects are neither hits nor misses.

    Returns:
        As torchmetrics names them, with `precision` [overlaps, recalls, classes, areas, limits]; -1 where a figure does
        not exist, as for objects of a size that does not occur.
    """
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="pycocotools", class_metrics=True, extended_summary=True)
    metric.warn_on_many_detections = False
    for example in examples:
        found, annotated = example.found, example.annotated
        metric.update(
            [
                {
                    "boxes": torch.from_numpy(found.boxes).float().view(-1, 4),
                    "scores": torch.from_numpy(found.scores),
                    "labels": torch.from_numpy(found.labels),
                }
            ],
            [
                {
                    "boxes": torch.from_numpy(annotated.boxes).float().view(-1, 4),
                    "labels": torch.from_numpy(annotated.labels),
                    "iscrowd": torch.from_numpy(annotated.ignored).int(),
                    "area": torch.from_numpy(example.areas),
                }
            ],
        )
    figures: dict[str, Any] = metric.compute()
    return figures


def report(
    examples: Sequence[Example],
    split: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    options: DetectionOptions,
    folder: Path,
    title: plots.Title,
) -> Evaluated:
    """Writes classes.csv, precision_recall.png, errors.csv, errors.png and detections.png into `folder`."""
    classes: Sequence[str] = meta["classes"]
    figures = average_precision(examples)
    known: list[int] = figures["classes"].reshape(-1).tolist()
    precision = figures["precision"].numpy()[..., 0, -1]  # [overlaps, recalls, classes], of all sizes
    precision = np.where(precision < 0, np.nan, precision)
    judged = [verdicts(example.found.above(options.score), example.annotated) for example in examples]
    counts = Counter(verdict.kind for image in judged for verdict in image)
    _write_classes(classes, known, precision, examples, judged, folder / "classes.csv")
    recall = np.linspace(0, 1, precision.shape[1])
    curves = {classes[label]: precision[0, :, place] for place, label in enumerate(known)}
    if len(curves) > CLASSES_SHOWN:
        curves = {}
    if np.isfinite(precision).any():  # a class without objects has none
        for place, overlap in ((0, 50), (5, 75)):
            curves[f"mean, overlap {overlap} %"] = np.nanmean(precision[place], axis=-1)
    detections.precision_recall(
        curves, recall, folder / "precision_recall.png", "Precision and recall, overlap 50 %", **title
    )
    tables.write_csv(folder / "errors.csv", [{"kind": kind, "count": counts[kind]} for kind in ("found", *KINDS)])
    _draw_errors(examples, judged, split, meta, folder / "errors.png", title)
    chosen = [
        examples[i] for i in np.linspace(0, len(examples) - 1, min(options.examples, len(examples))).round().astype(int)
    ]
    columns: dict[str, list[np.ndarray]] = {"annotated": [], "found": []}
    for example in chosen:
        image, placement = _image_of(example, split, meta)
        for name, objects in (("annotated", example.annotated), ("found", example.found.above(options.score))):
            columns[name].append(_drawn(image, _packed(objects, placement), classes))
    plots.image_grid({k: np.stack(v) for k, v in columns.items()}, folder / "detections.png", **title)

    def figure(name: str) -> float:
        value = float(figures[name])
        return float("nan") if value < 0 else value

    metrics = {
        "map": figure("map"),
        "ap50": figure("map_50"),
        "ap75": figure("map_75"),
        "map_small": figure("map_small"),
        "map_medium": figure("map_medium"),
        "map_large": figure("map_large"),
        "recall": figure("mar_100"),
        **{kind: float(counts[kind]) for kind in KINDS},
        "objects": float(sum((~example.annotated.ignored).sum() for example in examples)),
        "examples": len(examples),
    }
    pairs = [
        {"actual": actual, "predicted": predicted}
        for image in judged
        for actual, predicted in confusion(image, classes)
    ]
    return Evaluated(metrics, pairs, {"score": f"{options.score:g}"})


def _write_classes(
    classes: Sequence[str],
    known: Sequence[int],
    precision: np.ndarray,
    examples: Sequence[Example],
    judged: Sequence[Sequence[Verdict]],
    path: Path,
) -> None:
    """A row for each class: its objects, average precisions, and what became of its objects and detections."""
    objects = Counter(int(label) for e in examples for label in e.annotated.labels[~e.annotated.ignored])
    kinds = Counter(
        (verdict.kind, verdict.actual if verdict.kind in (MISSED, "found") else verdict.predicted)
        for image in judged
        for verdict in image
    )
    rows = []
    for label, name in enumerate(classes):
        row: dict[str, Any] = {"class": name, "objects": objects[label]}
        if label in known:
            of_class = precision[..., known.index(label)]
            row |= {"map": of_class.mean(), "ap50": of_class[0].mean(), "ap75": of_class[5].mean()}
        rows.append(row | {kind: kinds[kind, label] for kind in ("found", *KINDS)})
    tables.write_csv(path, rows)


def _image_of(example: Example, split: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
    """The packed image, uint8 [H, W, 3], and where the original lies in it."""
    image = KIND.shown(split, meta, [example.index])[0]
    return image, placement_of(meta, *split["sizes"][example.index].tolist())


def _packed(objects: Objects, placement: Any) -> Objects:
    """Objects in pixels of the packed image."""
    return Objects(placement.to_packed(objects.boxes), objects.labels, objects.scores, objects.ignored)


def _drawn(image: np.ndarray, objects: Objects, classes: Sequence[str] | None = None) -> np.ndarray:
    """An image with boxes, enlarged where it is small; with names and scores where there are names."""
    factor = max(1, -(-SHORT_SIDE // min(image.shape[:2]))) if classes else 1
    image = image.repeat(factor, 0).repeat(factor, 1)
    captions = [""] * len(objects.boxes)
    if classes:
        scores = ["" if score == 1 else f" {score:.0%}" for score in objects.scores]
        captions = [f"{classes[label]}{score}" for label, score in zip(objects.labels, scores, strict=True)]
    return detections.draw_boxes(image, objects.boxes * factor, objects.labels.tolist(), captions)


def _draw_errors(
    examples: Sequence[Example],
    judged: Sequence[Sequence[Verdict]],
    split: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    path: Path,
    title: plots.Title,
) -> None:
    """A column for each kind of error: the largest missed objects, and the detections with the highest scores.

    One box in each picture: that of the error. A kind with fewer errors has empty tiles.
    """
    classes: Sequence[str] = meta["classes"]
    columns: dict[str, np.ndarray] = {}
    for kind in KINDS:
        errors = [
            (example, verdict)
            for example, image in zip(examples, judged, strict=True)
            for verdict in image
            if verdict.kind == kind
        ]
        errors.sort(key=lambda error: -(_area(error[1].box) if kind == MISSED else error[1].score))
        tiles = []
        for example, verdict in errors[:ERRORS_SHOWN]:
            image, placement = _image_of(example, split, meta)
            label = verdict.actual if verdict.predicted is None else verdict.predicted
            assert label is not None
            one = Objects(
                placement.to_packed(verdict.box[None]), np.array([label]), np.array([verdict.score]), np.zeros(1, bool)
            )
            tiles.append(_drawn(image, one, classes))
        if not tiles and not columns:
            image, _ = _image_of(examples[0], split, meta)
            tiles.append(np.full_like(_drawn(image, _NOTHING, classes), 255))
        empty = np.full_like(tiles[0] if tiles else next(iter(columns.values()))[0], 255)
        columns[kind] = np.stack([*tiles, *[empty] * (ERRORS_SHOWN - len(tiles))])
    plots.image_grid(columns, path, **title)


_NOTHING = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros(0, bool))


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


TASK = Detection()
