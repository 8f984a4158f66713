"""Reconstruction of images from few numbers, measured beside the best that any linear map can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from src.common.pictures import beside, spread, to_bytes, to_picture
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation, PositiveInt
from src.data.batching import limited
from src.data.kinds.images import image_to_image_snippet
from src.reporting import plots, tables
from src.tasks import Answer, Evaluated, Request, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.data.batching import Batches

POINTS = 2000  # images shown in the plane of latent numbers
SHOWN_IN_TRAINING = 8  # images


class ReconstructionOptions(Evaluation):
    """What evaluate shows of reconstructions, and how long it trains their judge."""

    examples: PositiveInt = Field(default=6, description="half of the images shown, each with its reconstruction")
    judge_steps: PositiveInt = Field(default=1000, description="training steps of the judge, at batch 128")


METRICS: Mapping[str, Metric] = {
    "mse": Metric("min", "mean squared error"),
    "loss": Metric("min", "loss", is_validated=True),  # the mean squared error as the training logs it
    "psnr": Metric("max", "PSNR, dB", is_validated=True),
    "mae": Metric("min", "mean absolute error"),
    "ssim": Metric("max", "SSIM"),
    "recognised": Metric("max", "recognised", is_fraction=True),
    "recognised_real": Metric(None, "recognised, real images", is_fraction=True),
    "mse_pca": Metric(None, "mean squared error of principal components"),
    "latent": Metric(None, "latent numbers"),
    "examples": Metric(None, "examples"),
}


class Reconstruction(Task):
    """An image given back from a few latent numbers. A model answers pictures, fp32 [B, C, H, W] in 0..1.

    A model also has `encode`: uint8 [B, C, H, W] -> latent numbers fp32 [B, L].
    """

    takes = ("images",)
    metrics = METRICS
    options = ReconstructionOptions

    def evaluate(
        self, model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
    ) -> Evaluated:
        """Draws grid.png and latent.png into `folder`.

        MSE and MAE are of pixels in 0..1, PSNR is in dB, all are means over the images. `mse_pca` is the MSE of a
        principal component analysis of the training split with as many numbers per image. `recognised` is the share of
        reconstructions that a judge (mnist_cnn's network, trained now on the training split) takes for what they are,
        beside that of the images themselves; the pairs are each image's class and the one its reconstruction is taken
        for.
        """
        from sklearn.decomposition import PCA
        from torch import Tensor
        from torchmetrics.functional import image as torchmetrics

        from src.data import packed
        from src.scoring.image_classifier import judgements, train_judge

        options, classes = config.evaluation, meta["classes"]
        assert isinstance(options, ReconstructionOptions)
        title = plots.Title(label=config.label, sample=config.sample)
        images, drawn, latents, labels = encoded(model, test, config.trainer.limit_test_batches)
        columns = {"input": images, "output": to_bytes(drawn)}
        plots.image_grid(spread(columns, 2 * options.examples), folder / "grid.png", **title)
        points = PCA(min(2, latents.shape[1], len(latents))).fit_transform(latents.double().numpy())
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))  # of one latent number, a line
        plots.latent_plane(points[:POINTS], labels[:POINTS].numpy(), classes, folder / "latent.png", **title)

        real = images.float() / 255
        errors = (drawn - real).square().flatten(1).mean(1)
        psnr = torchmetrics.peak_signal_noise_ratio(
            drawn, real, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)
        )
        ssim = torchmetrics.structural_similarity_index_measure(drawn, real, data_range=1.0)
        assert isinstance(ssim, Tensor)  # a pair only where contrast or the full image is asked for
        train = packed.read_split(config.processed, "train")
        judge = train_judge(train["images"], train["labels"], len(classes), steps=options.judge_steps, seed=config.seed)
        _, classes_drawn = judgements(judge, columns["output"])
        _, classes_real = judgements(judge, images)
        metrics = {
            "mse": float(errors.mean()),
            "mae": float((drawn - real).abs().mean()),
            "psnr": float(psnr),
            "ssim": float(ssim),
            "mse_pca": linear_error(train["images"], images, latents.shape[1]),
            "recognised": float((classes_drawn == labels).double().mean()),
            "recognised_real": float((classes_real == labels).double().mean()),
            "latent": latents.shape[1],
            "examples": len(images),
        }
        return Evaluated(metrics, tables.confusion_pairs(labels.numpy(), classes_drawn.numpy(), classes))

    def showcase(self, model: Any, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        images = batch[0][:SHOWN_IN_TRAINING]
        return {"input": images, "output": to_bytes(model.answer(images))}

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        return Answer(picture=to_picture(outputs[0][0]), file=beside(request.source, signature["name"]))

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return "image-to-image"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return image_to_image_snippet(signature)


def encoded(model: Any, batches: Batches, limit: int | float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On the CPU: images uint8 [N, C, H, W], reconstructions fp32 in 0..1, latent numbers fp32 [N, L], labels [N]."""
    import torch

    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for (images, labels), _ in limited(batches, limit):
            parts.append((images, model.answer(images), model.encode(images), labels))
    images, drawn, latents, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return images, drawn, latents, labels


def linear_error(train: Tensor, test: Tensor, count: int) -> float:
    """The test images' MSE in 0..1 when `count` principal components of the training images stand for each.

    uint8 [N, C, H, W] both. No linear autoencoder is better on the images that it was fitted to.
    """
    from sklearn.decomposition import PCA

    fitted, pixels = (images.flatten(1).double().numpy() / 255 for images in (train, test))
    pca = PCA(count, svd_solver="covariance_eigh").fit(fitted)
    return float(np.square(pixels - pca.inverse_transform(pca.transform(pixels))).mean())


TASK = Reconstruction()
