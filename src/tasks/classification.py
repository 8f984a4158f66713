"""How good a classifier is on the test split: the field's metrics, its calibration, its most confident mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional import classification as metrics

from src.configuration.schema import Config, Evaluation
from src.data.batching import Batches
from src.reporting import plots, tables


def evaluate(
    model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """The figures of a classifier on the test split, and (actual, predicted) of each example; see `report`."""
    found = probabilities(model, test, config.trainer.limit_test_batches)
    return report(*found, test.split, meta, config.evaluation, folder, label=config.label, sample=config.sample)


def probabilities(
    model: nn.Module, batches: Batches, limit: int | float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Class probabilities [N, C] fp32, labels int64 [N] and the examples' places in the split int64 [N], on the CPU."""
    found: list[Tensor] = []
    labels: list[Tensor] = []
    places: list[Tensor] = []
    with torch.inference_mode():
        for (*inputs, truth), chosen in limited(batches, limit):
            found.append(model(*inputs).float().softmax(1).cpu())
            labels.append(truth.cpu())
            places.append(chosen)
    return torch.cat(found), torch.cat(labels), torch.cat(places)


def limited(batches: Batches, limit: int | float | None) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Batches with their examples' places: the first `limit` of them (a fraction if it is a float), at least one."""
    count = len(batches) if limit is None else round(limit * len(batches)) if isinstance(limit, float) else limit
    yield from zip(batches, batches.order()[: max(1, count)], strict=False)


def report(
    probability: Tensor,
    labels: Tensor,
    places: Tensor,
    split: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    wanted: Evaluation,
    folder: Path,
    *,
    label: str,
    sample: bool,
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Draws confusion, calibration and mistakes into `folder`.

    Returns the metrics, and (actual, predicted) of each example. Files: confusion.png, calibration.csv and
    .png, mistakes.png (images) or mistakes.md (texts).
    """
    classes: Sequence[str] = meta["classes"]
    confidence, predicted = probability.max(1)
    correct = (predicted == labels).numpy()
    matrix = metrics.multiclass_confusion_matrix(predicted, labels, len(classes)).numpy()
    plots.confusion_matrix(matrix, classes, folder / "confusion.png", label=label, sample=sample)
    bins = wanted.calibration_bins
    tables.write_csv(folder / "calibration.csv", plots.calibration_bins(confidence.numpy(), correct, bins))
    plots.reliability_diagram(
        confidence.numpy(), correct, folder / "calibration.png", bins=bins, label=label, sample=sample
    )

    wrong = np.flatnonzero(~correct)
    worst = wrong[np.argsort(-confidence.numpy()[wrong], kind="stable")][: wanted.mistakes]
    rows: list[dict[str, Any]] = [
        {
            "true": classes[int(labels[i])],
            "predicted": classes[int(predicted[i])],
            "confidence": float(confidence[i]),
            "place": int(places[i]),
        }
        for i in worst
    ]
    if meta["kind"] == "images":
        images = split["images"][[row["place"] for row in rows]].permute(0, 2, 3, 1).numpy()
        captions = [f"{row['predicted']} {row['confidence']:.0%}\nis {row['true']}" for row in rows]
        plots.mistakes(images, captions, folder / "mistakes.png", label=label, sample=sample)
    else:
        texts = [row | {"text": _text(split, meta, row["place"])} for row in rows]
        tables.text_mistakes(texts, folder / "mistakes.md", label=label, sample=sample)

    scores = {
        "accuracy": float(correct.mean()),
        "precision": float(metrics.multiclass_precision(predicted, labels, len(classes), average="macro")),
        "recall": float(metrics.multiclass_recall(predicted, labels, len(classes), average="macro")),
        "f1": float(metrics.multiclass_f1_score(predicted, labels, len(classes), average="macro")),
        "calibration_error": plots.calibration_error(confidence.numpy(), correct, bins),
        "loss": float(nn.functional.nll_loss(probability.clamp_min(1e-12).log(), labels)),
        "examples": len(labels),
    }
    return scores, tables.confusion_pairs(labels.numpy(), predicted.numpy(), classes)


def _text(split: Mapping[str, Tensor], meta: Mapping[str, Any], place: int) -> str:
    """A packed text as the network reads it: its tokens."""
    start, end = split["offsets"][place : place + 2].tolist()
    return " ".join(meta["vocabulary"][token] for token in split["tokens"][start:end].tolist())
