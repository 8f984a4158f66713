"""How well an autoencoder gives the test split's images back, beside the best that any linear map can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import image as metrics

from src.configuration.schema import Config
from src.data import packed
from src.data.batching import Batches
from src.reporting import plots, tables
from src.scoring.image_classifier import judgements, train_judge
from src.tasks.classification import limited

POINTS = 2000  # images whose latent numbers are drawn


def evaluate(
    model: Any, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Draws grid.png and latent.png into `folder`.

    Returns MSE and MAE (pixels in 0..1), PSNR (dB) and SSIM, means over the images; `mse_pca`, the MSE of a principal
    component analysis of the training split with as many numbers per image; `recognised`, the share of reconstructions
    that a judge (mnist_cnn's network, trained here on the training split) takes for what they are, beside that of the
    images themselves. The rows are each image's class and the one that its reconstruction is taken for.
    """
    images, drawn, latents, labels = encoded(model, test, config.trainer.limit_test_batches)
    title: dict[str, Any] = {"label": config.label, "sample": config.sample}
    shown = np.linspace(0, len(images) - 1, min(2 * config.evaluation.examples, len(images))).round().astype(int)
    columns = {"input": images, "output": drawn.mul(255).round().to(torch.uint8)}
    tiles = {name: given[shown].permute(0, 2, 3, 1).numpy() for name, given in columns.items()}
    plots.image_grid(tiles, folder / "grid.png", **title)
    plane = principal_components(latents.double(), 2)
    points = (latents - latents.mean(0)).double() @ plane
    plots.latent_plane(
        points[:POINTS].numpy(), labels[:POINTS].numpy(), meta["classes"], folder / "latent.png", **title
    )
    real = images.float() / 255
    error = (drawn - real).square().flatten(1).mean(1)
    ratio = metrics.peak_signal_noise_ratio(drawn, real, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = metrics.structural_similarity_index_measure(drawn, real, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a pair only where contrast or the whole image is asked for
    train, classes = packed.read_split(config.processed, "train"), meta["classes"]
    judge = train_judge(
        train["images"], train["labels"], len(classes), steps=config.evaluation.judge_steps, seed=config.seed
    )
    _, taken = judgements(judge, columns["output"])
    _, taken_real = judgements(judge, images)
    return {
        "mse": float(error.mean()),
        "mae": float((drawn - real).abs().mean()),
        "psnr": float(ratio),
        "ssim": float(ssim),
        "mse_pca": linear_error(train["images"], images, latents.shape[1]),
        "recognised": float((taken == labels).double().mean()),
        "recognised_real": float((taken_real == labels).double().mean()),
        "latent": latents.shape[1],
        "examples": len(images),
    }, tables.confusion_pairs(labels.numpy(), taken.numpy(), classes)


def encoded(model: Any, batches: Batches, limit: int | float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On the CPU: images uint8 [N, C, H, W], reconstructions fp32 in 0..1, latent numbers fp32 [N, L], labels [N]."""
    found: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for (images, labels), _ in limited(batches, limit):
            found.append((images, model.answer(images), model.encode(images), labels))
    images, drawn, latents, labels = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    return images, drawn, latents, labels


def principal_components(points: Tensor, count: int) -> Tensor:
    """The directions in which points, double [N, D], vary most, double [D, count]; signs are fixed."""
    _, vectors = torch.linalg.eigh(points.T.cov())
    chosen = vectors.flip(1)[:, :count]
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    return chosen * largest.sign()


def linear_error(train: Tensor, test: Tensor, count: int) -> float:
    """The test images' MSE in 0..1 when `count` principal components of the training images stand for each.

    uint8 [N, C, H, W] both. No linear autoencoder is better on the images that it was fitted to.
    """
    dimensions = train[0].numel()
    total, second = torch.zeros(dimensions, dtype=torch.float64), torch.zeros(dimensions, dimensions).double()
    for some in train.split(5000):  # all images as doubles would be eight times their size
        pixels = some.flatten(1).double() / 255
        total, second = total + pixels.sum(0), second + pixels.T @ pixels
    mean = total / len(train)
    _, vectors = torch.linalg.eigh(second / len(train) - torch.outer(mean, mean))
    kept = vectors.flip(1)[:, :count]
    centred = test.flatten(1).double() / 255 - mean
    return float((centred - centred @ kept @ kept.T).square().mean())
