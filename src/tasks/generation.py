"""How good and how varied a generator's images are, in the eyes of a classifier of the project's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.configuration.schema import Config
from src.data import packed
from src.data.batching import Batches
from src.reporting import plots
from src.scoring.fidelity import COLLAPSED, diversity, frechet_distance, precision_recall
from src.scoring.image_classifier import judgements, train_judge
from src.tasks.classification import limited

GRID = 100  # images that are shown
COMPARED = 5000  # images whose distances to each other are measured: memory grows with the square


def evaluate(
    model: Any, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Draws samples.png into `folder`; the rows returned are what the judge takes real and drawn images for.

    As many images are drawn as the test split has. Frechet distance, precision and recall are those of the features of
    mnist_cnn's network, trained here on the training split: a judge that needs no other run. `frechet_real`, the same
    distance of the training images (as many) to the test images, is what a perfect generator would have.
    """
    real = torch.cat([batch[0].cpu() for batch, _ in limited(test, config.trainer.limit_test_batches)])
    labels = test.split["labels"].cpu()[: len(real)]
    drawn = draw(model, len(real), config.seed)
    shown = drawn[:GRID].permute(0, 2, 3, 1).numpy()
    plots.samples(shown, folder / "samples.png", label=config.label, sample=config.sample)

    train, classes = packed.read_split(config.processed, "train"), meta["classes"]
    judge = train_judge(
        train["images"], train["labels"], len(classes), steps=config.evaluation.judge_steps, seed=config.seed
    )
    of_real, taken_real = judgements(judge, real)
    of_drawn, taken_drawn = judgements(judge, drawn)
    of_train, _ = judgements(judge, some_of(train["images"], len(real)))
    precision, recall = precision_recall(of_real[:COMPARED], of_drawn[:COMPARED])
    # A tenth of its even share and a class counts as drawn.
    counts = torch.bincount(taken_drawn, minlength=len(classes))
    met = int((counts >= 0.1 * len(drawn) / len(classes)).sum())
    rows = [
        {"actual": what, "predicted": classes[place]}
        for what, taken in (("real", taken_real), ("drawn", taken_drawn))
        for place in taken.tolist()
    ]
    variety = diversity(real[:COMPARED], drawn[:COMPARED])
    return {
        "frechet": frechet_distance(of_real, of_drawn),
        "frechet_real": frechet_distance(of_real, of_train),
        "precision": precision,
        "recall": recall,
        "diversity": variety,
        "classes_drawn": met,
        "collapsed": int(variety < COLLAPSED or 2 * met <= len(classes)),
        "judge_accuracy": float((taken_real == labels).double().mean()),
        "examples": len(drawn),
    }, rows


def draw(model: Any, count: int, seed: int) -> Tensor:
    """Images uint8 [count, C, H, W] on the CPU, the same for the same seed."""
    with torch.inference_mode():
        made = [model.answer(some) for some in model.draw_latents(count, seed).split(500)]
    return torch.cat(made).mul(255).round().to(torch.uint8).cpu()


def some_of(images: Tensor, count: int) -> Tensor:
    """At most `count` images spread over all."""
    return images[:: max(1, len(images) // count)][:count]
