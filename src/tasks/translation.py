"""How good a picture-to-picture model is on the test split: distances to the target, and labels that are read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional import image as metrics

from src.common.hardware import fast_bf16
from src.configuration.schema import Config, Evaluation
from src.data import packed
from src.data.batching import Batches
from src.data.sets.facade_palette import FACADE_PALETTE
from src.reporting import plots, tables
from src.scoring.segmenter import segmentation_scores, train_segmenter
from src.tasks.classification import limited

GRID = 8  # pixels a side whose label, actual and read back, goes into the confusion plot


def evaluate(
    model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """The figures of the test split's pictures, and (actual, read back) labels where the input is a label map."""
    pictures = generated(model, test, config.trainer.limit_test_batches)
    metrics = report(*pictures, config.evaluation, folder, label=config.label, sample=config.sample)
    if not meta["palette"]:
        return metrics, []
    train = packed.read_split(config.processed, "train")
    # Judged on the CPU, wherever the model was trained; so it is this CPU's bf16 that may pay.
    bf16 = config.trainer.precision != "32" and fast_bf16(torch.device("cpu"))
    scores, pairs = label_recovery(train, *pictures, config.evaluation, seed=config.seed, bf16=bf16)
    return metrics | scores, pairs


def generated(model: nn.Module, batches: Batches, limit: int | float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, pictures and targets, each uint8 [N, 3, S, S] on the CPU."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for (source, target), _ in limited(batches, limit):
            picture = model(source).float().mul(255).round().clamp(0, 255).to(torch.uint8)
            found.append((source.cpu(), picture.cpu(), target.cpu()))
    inputs, pictures, targets = (torch.cat(part) for part in zip(*found, strict=True))
    return inputs, pictures, targets


def report(
    inputs: Tensor, pictures: Tensor, targets: Tensor, wanted: Evaluation, folder: Path, *, label: str, sample: bool
) -> dict[str, float]:
    """Writes grid.png into `folder`; returns L1 (in 0..1), PSNR (dB) and SSIM, means over the pictures."""
    shown = np.linspace(0, len(inputs) - 1, min(wanted.examples, len(inputs))).round().astype(int)
    columns = {"input": inputs, "output": pictures, "target": targets}
    tiles = {name: images[shown].permute(0, 2, 3, 1).numpy() for name, images in columns.items()}
    plots.image_grid(tiles, folder / "grid.png", label=label, sample=sample)
    drawn, true = pictures.float() / 255, targets.float() / 255
    psnr = metrics.peak_signal_noise_ratio(drawn, true, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = metrics.structural_similarity_index_measure(drawn, true, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a pair only where contrast or the whole image is asked for
    return {
        "l1": float((drawn - true).abs().mean()),
        "psnr": float(psnr),
        "ssim": float(ssim),
        "examples": len(inputs),
    }


def labels_of(maps: Tensor) -> Tensor:
    """Label maps, uint8 [N, 3, S, S], as classes int64 [N, S, S]: the nearest colour of the palette."""
    colours = torch.tensor(list(FACADE_PALETTE.values()), dtype=torch.float32)
    # |a - b|^2 = |a|^2 - 2ab + |b|^2, of which |a|^2 is the same for all colours; one picture at a time saves memory.
    found = [
        (colours.square().sum(1)[:, None, None] - 2 * torch.einsum("chw,kc->khw", m.float(), colours)).argmin(0)
        for m in maps
    ]
    return torch.stack(found)


def label_recovery(
    train: Mapping[str, Tensor],
    inputs: Tensor,
    pictures: Tensor,
    targets: Tensor,
    wanted: Evaluation,
    *,
    seed: int,
    bf16: bool,
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """How well labels can be read back off generated pictures, beside what the same reader scores on real photos.

    The reader is a small U-Net trained on the training part's real photos and label maps: the paper's FCN score with a
    judge of its own. `labels_recovered` is the ratio of the per-pixel accuracies, NaN if the reader reads nothing on
    photos. Also returned: (actual, read back) of each pixel on a coarse grid over the generated pictures.
    """
    classes = len(FACADE_PALETTE)
    judge = train_segmenter(
        train["target"],
        labels_of(train["input"]),
        classes,
        width=wanted.segmenter_width,
        epochs=wanted.segmenter_epochs,
        seed=seed,
        autocast=torch.bfloat16 if bf16 else None,
    )
    truth = labels_of(inputs)
    scores: dict[str, float] = {}
    read = {}
    for name, images in (("generated", pictures), ("real", targets)):
        with torch.inference_mode():
            read[name] = torch.cat([judge(some.float() / 255).argmax(1) for some in images.split(8)])
        confusion = torch.bincount((truth * classes + read[name]).flatten(), minlength=classes * classes)
        found = segmentation_scores(confusion.view(classes, classes))
        scores |= {f"labels_{key}_{name}": value for key, value in found.items()}
    real = scores["labels_pixel_accuracy_real"]
    scores["labels_recovered"] = scores["labels_pixel_accuracy_generated"] / real if real else float("nan")
    step = max(1, truth.shape[-1] // GRID)
    actual, read_back = (
        x[:, step // 2 :: step, step // 2 :: step].flatten().numpy() for x in (truth, read["generated"])
    )
    return scores, tables.confusion_pairs(actual, read_back, list(FACADE_PALETTE))
