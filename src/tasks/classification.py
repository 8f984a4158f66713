"""Classification of images and texts: the field's metrics, calibration, and the most confident mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation, PositiveInt
from src.data import kinds
from src.data.batching import limited
from src.reporting import plots, tables
from src.tasks import Answer, Evaluated, Request, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.data.batching import Batches


class ClassificationOptions(Evaluation):
    """What evaluate shows of a classifier."""

    calibration_bins: PositiveInt = Field(default=15, description="bars of the reliability diagram")
    mistakes: PositiveInt = Field(default=16, description="the most confident mistakes, shown")
    tta: Literal["none", "mirror", "six_views"] = Field(
        default="none",
        description="test-time augmentation: the mean prediction over a picture and its mirror image (mirror), or over"
        " these moved by a pixel as well (six_views)",
    )


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("max", "accuracy", is_fraction=True, is_validated=True),
    "loss": Metric("min", "loss", is_validated=True),
    "f1": Metric("max", "F1", is_fraction=True),
    "precision": Metric("max", "precision", is_fraction=True),
    "recall": Metric("max", "recall", is_fraction=True),
    "calibration_error": Metric("min", "calibration error"),
    "examples": Metric(None, "examples"),
}


def right_answers(outputs: Sequence[np.ndarray], batch: Sequence[np.ndarray]) -> float:
    """How many examples of a batch have their label as the most probable class."""
    return float((outputs[0].argmax(1) == batch[-1]).sum())


class Classification(Task):
    """Which of several classes an example belongs to. A model answers class probabilities, fp32 [B, classes]."""

    takes = ("images", "text")
    metrics = METRICS
    options = ClassificationOptions
    int8_figures = MappingProxyType({"accuracy": right_answers})

    def evaluate(
        self, model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
    ) -> Evaluated:
        """Also (actual, predicted) of each example. Files: see `report`."""
        assert isinstance(config.evaluation, ClassificationOptions)
        tta = config.evaluation.tta
        label = config.label if tta == "none" else f"{config.label}, {tta}"
        title = plots.Title(label=label, sample=config.sample)
        evaluated = report(
            *probabilities(model, test, config.trainer.limit_test_batches, tta),
            test.split,
            meta,
            config.evaluation,
            folder,
            title,
        )
        return evaluated if tta == "none" else replace(evaluated, options={"tta": tta})

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        probability = outputs[0][0]
        order = np.argsort(-probability, kind="stable")[: request.top]
        rows = [{"class": signature["classes"][index], "probability": float(probability[index])} for index in order]
        return Answer([f"{row['probability']:7.2%}  {row['class']}" for row in rows], rows)

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return kinds.load(signature["kind"]).hub_prefix + "-classification"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        kind = kinds.load(signature["kind"])
        feed = ", ".join(f'"{name}": {name}' for name in kind.inputs.names)
        return f"""\
{kind.snippet(signature)}scores = session.run(None, {{{feed}}})[0]  # [batch, {len(signature["classes"])}]
print({list(signature["classes"])}[scores[0].argmax()])
"""


def probabilities(
    model: nn.Module, batches: Batches, limit: int | float | None = None, tta: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Class probabilities [N, C] fp32, labels int64 [N] and indices in the split int64 [N], on the CPU.

    Raises:
        Failure: `tta` with another input than pictures.
    """
    import torch

    from src.scoring.views import averaged_logits

    if tta != "none" and batches.meta["kind"] != "images":
        raise Failure(f"evaluation.tta: {tta!r} takes pictures, not {batches.meta['kind']}; use evaluation.tta=none")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for (*inputs, labels), indices in limited(batches, limit):
            logits = model(*inputs) if tta == "none" else averaged_logits(model, inputs[0], tta)
            parts.append((logits.float().softmax(1).cpu(), labels.cpu(), indices))
    probability, labels, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return probability, labels, indices


def report(
    probability: Tensor,
    labels: Tensor,
    indices: Tensor,
    split: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    options: ClassificationOptions,
    folder: Path,
    title: plots.Title,
) -> Evaluated:
    """Writes confusion.png, calibration.csv and .png, mistakes.png (images) or mistakes.md (texts) into `folder`."""
    from torch.nn import functional as F
    from torchmetrics.functional import classification as torchmetrics

    from src.scoring.calibration import calibration_bins, calibration_error

    classes: Sequence[str] = meta["classes"]
    count = len(classes)
    confidence, predicted = probability.max(1)
    correct = (predicted == labels).numpy()
    matrix = torchmetrics.multiclass_confusion_matrix(predicted, labels, count).numpy()
    plots.confusion_matrix(matrix, classes, folder / "confusion.png", **title)
    bins = calibration_bins(confidence.numpy(), correct, options.calibration_bins)
    tables.write_csv(folder / "calibration.csv", bins)
    plots.reliability_diagram(bins, calibration_error(bins), folder / "calibration.png", **title)

    wrong = np.flatnonzero(~correct)
    worst = wrong[np.argsort(-confidence.numpy()[wrong], kind="stable")][: options.mistakes]
    rows = [
        {
            "true": classes[int(labels[i])],
            "predicted": classes[int(predicted[i])],
            "confidence": float(confidence[i]),
        }
        for i in worst
    ]
    examples = kinds.load(meta["kind"]).shown(split, meta, [int(indices[i]) for i in worst])
    if isinstance(examples, list):
        tables.text_mistakes(examples, rows, folder / "mistakes.md", **title)
    else:
        plots.mistakes(examples, rows, folder / "mistakes.png", **title)

    metrics = {
        "accuracy": float(correct.mean()),
        "precision": float(torchmetrics.multiclass_precision(predicted, labels, count, average="macro")),
        "recall": float(torchmetrics.multiclass_recall(predicted, labels, count, average="macro")),
        "f1": float(torchmetrics.multiclass_f1_score(predicted, labels, count, average="macro")),
        "calibration_error": calibration_error(bins),
        "loss": float(F.nll_loss(probability.clamp_min(1e-12).log(), labels)),
        "examples": len(labels),
    }
    return Evaluated(metrics, tables.confusion_pairs(labels.numpy(), predicted.numpy(), classes))


TASK = Classification()
