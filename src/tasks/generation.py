"""Generation of images from latent numbers: their quality and variety, as a classifier trained here judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.common.pictures import mosaic, to_bytes, to_picture
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation, PositiveInt
from src.data import packed
from src.data.batching import limited
from src.data.kinds import Feed, Inputs
from src.data.kinds.images import WRITE_PICTURE
from src.reporting import plots
from src.tasks import Answer, Evaluated, Request, Task

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batches, BatchSource

SHOWN = 100  # images in samples.png
SHOWN_IN_TRAINING = 64  # images, of the same latent numbers after each validation
COLLAPSED = 0.25  # the diversity below which a generator counts as collapsed


class GenerationOptions(Evaluation):
    """How long evaluate trains the judge of drawn images."""

    judge_steps: PositiveInt = Field(default=1000, description="training steps of the judge, at batch 128")


METRICS: Mapping[str, Metric] = {
    "frechet": Metric("min", "Frechet distance", is_validated=True),
    "diversity": Metric("max", "diversity", is_validated=True),
    "precision": Metric("max", "precision", is_fraction=True),
    "recall": Metric("max", "recall", is_fraction=True),
    "classes_drawn": Metric("max", "classes drawn"),
    "collapsed": Metric("min", "collapsed"),
    "frechet_real": Metric(None, "Frechet distance of real images"),
    "judge_accuracy": Metric(None, "accuracy of the judge", is_fraction=True),
    "generator_loss": Metric(None, "loss"),
    "discriminator_loss": Metric(None, "loss"),
    "real_judgement": Metric(None, "judgement"),
    "drawn_judgement": Metric(None, "judgement"),
    "wasserstein": Metric(None, "Wasserstein distance"),
    "examples": Metric(None, "examples"),
}


class Generation(Task):
    """Images drawn from latent numbers, fp32 [B, L]. A model answers images, fp32 [B, C, H, W] in 0..1.

    A model also has `latent`, how many numbers that are, and `draw_latents(count, seed)`.
    """

    takes = ("images",)
    metrics = METRICS
    options = GenerationOptions

    def evaluate(self, model: Any, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path) -> Evaluated:
        """Draws samples.png into `folder`; the pairs are what the judge takes real and drawn images for.

        As many images are drawn as the test split has. Frechet distance, precision and recall are those of the features
        of mnist_cnn's network, trained now on the training split: a judge that needs no other run. `frechet_real`, the
        same distance of the training images (as many) to the test images, is what a perfect generator would have.
        """
        import torch

        from src.models.fidelity import COMPARED, diversity, frechet_distance, precision_recall
        from src.scoring.image_classifier import judgements, train_judge

        options, classes = config.evaluation, meta["classes"]
        assert isinstance(options, GenerationOptions)
        real = torch.cat([batch[0].cpu() for batch, _ in limited(test, config.trainer.limit_test_batches)])
        labels = test.split["labels"].cpu()[: len(real)]
        drawn = draw(model, len(real), config.seed)
        plots.samples(
            drawn[:SHOWN].permute(0, 2, 3, 1).numpy(),
            folder / "samples.png",
            label=config.label,
            sample=config.sample,
        )
        train = packed.read_split(config.processed, "train")
        judge = train_judge(train["images"], train["labels"], len(classes), steps=options.judge_steps, seed=config.seed)
        features_real, classes_real = judgements(judge, real)
        features_drawn, classes_drawn = judgements(judge, drawn)
        features_train, _ = judgements(judge, spread_over(train["images"], len(real)))
        precision, recall = precision_recall(features_real[:COMPARED], features_drawn[:COMPARED])
        # A class counts as drawn from 10 % of its fair share on.
        counts = torch.bincount(classes_drawn, minlength=len(classes))
        covered = int((counts >= 0.1 * len(drawn) / len(classes)).sum())
        variety = diversity(real[:COMPARED], drawn[:COMPARED])
        metrics = {
            "frechet": frechet_distance(features_real, features_drawn),
            "frechet_real": frechet_distance(features_real, features_train),
            "precision": precision,
            "recall": recall,
            "diversity": variety,
            "classes_drawn": covered,
            "collapsed": int(variety < COLLAPSED or 2 * covered <= len(classes)),
            "judge_accuracy": float((classes_real == labels).double().mean()),
            "examples": len(drawn),
        }
        judged = (("real", classes_real), ("drawn", classes_drawn))
        pairs = [
            {"actual": name, "predicted": classes[index]} for name, indices in judged for index in indices.tolist()
        ]
        return Evaluated(metrics, pairs)

    def inputs(self, kind: str) -> Inputs:
        return Inputs(("latent",), ({0: "batch"},))

    def batches(self, model: Any, batches: Batches) -> BatchSource:
        return [(model.draw_latents(32, seed),) for seed in range(3)]

    def showcase(self, model: Any, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        return {"drawn": to_bytes(model.answer(model.draw_latents(SHOWN_IN_TRAINING, 0)))}

    def remark(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Tells a collapse of the generator, by the diversity of what it draws."""
        collapsed = [row for row in history if row.get("val_diversity", 1.0) < COLLAPSED]
        if not collapsed:
            return None
        recovered = "" if history[-1] in collapsed else ", and recovered"
        least = min(row["val_diversity"] for row in collapsed)
        return (
            f"The generator collapsed in epoch {collapsed[0]['epoch']:.0f}{recovered}: its images' diversity fell to "
            f"{least:.2f} of the real ones'."
        )

    def signature(self, model: Any, meta: Mapping[str, Any], config: Config) -> dict[str, Any]:
        return super().signature(model, meta, config) | {"latent": model.latent}

    def encode(self, request: Request, signature: Mapping[str, Any]) -> Feed:
        """Latent numbers, float32 [count, latent], the same for the same seed."""
        if request.source is not None:
            raise Failure(
                f"{request.source}: {signature['name']} takes no input, it draws images: give --count and --seed"
            )
        if request.count < 1:
            raise Failure(f"--count {request.count}: at least one image must be drawn")
        random = np.random.default_rng(request.seed)
        return {"latent": random.standard_normal((request.count, signature["latent"]), np.float32)}

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        """All images as one picture."""
        picture = mosaic(outputs[0].transpose(0, 2, 3, 1)).transpose(2, 0, 1)
        return Answer(picture=to_picture(picture), file=Path(f"{signature['name']}-{request.seed}.png"))

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return "unconditional-image-generation"

    def example_arguments(self, signature: Mapping[str, Any]) -> str:
        return "--count 16 --seed 0"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        channels, height, width = signature["shape"]
        return f"""\
from PIL import Image
latent = np.random.default_rng(0).standard_normal((16, {signature["latent"]}), np.float32)
output = session.run(None, {{"latent": latent}})[0]  # float32 [16, {channels}, {height}, {width}] in 0..1
{WRITE_PICTURE}"""


def draw(model: Any, count: int, seed: int) -> Tensor:
    """Images uint8 [count, C, H, W] on the CPU, the same for the same seed."""
    import torch

    with torch.inference_mode():
        images = [model.answer(latents) for latents in model.draw_latents(count, seed).split(500)]
    return to_bytes(torch.cat(images)).cpu()


def spread_over(images: Tensor, count: int) -> Tensor:
    """At most `count` images, taken at equal distances from all."""
    return images[:: max(1, len(images) // count)][:count]


TASK = Generation()
