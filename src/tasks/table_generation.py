"""Generation of rows of numbers from latent numbers: how far their distribution is from that of the real rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation
from src.data import packed
from src.data.batching import limited
from src.reporting import plots
from src.tasks import Answer, Evaluated, Request
from src.tasks.generation import COLLAPSED, Generation, spread_over
from src.tasks.generation import METRICS as GENERATION

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batches

SHOWN = 64  # rows in rows.png, and during training
DEVIATIONS = 3.0  # from the mean, which are black and white in the picture


class TableGenerationOptions(Evaluation):
    """No option: rows need no judge."""


METRICS: Mapping[str, Metric] = {
    name: GENERATION[name]
    for name in (
        "frechet",
        "diversity",
        "precision",
        "recall",
        "collapsed",
        "frechet_real",
        "generator_loss",
        "discriminator_loss",
        "real_judgement",
        "drawn_judgement",
        "wasserstein",
        "examples",
    )
} | {"correlation_error": Metric("min", "error of correlations")}


class TableGeneration(Generation):
    """Rows drawn from latent numbers, fp32 [B, L]. A model answers standardised rows, fp32 [B, D]."""

    takes = ("table",)
    metrics = METRICS
    options = TableGenerationOptions  # type: ignore[assignment]  # others than those of images

    def evaluate(self, model: Any, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path) -> Evaluated:
        """Draws rows.png into `folder`; as many rows are generated as the test split has.

        All figures are of standardised rows. `frechet_real` is the distance of as many training rows to the test rows.
        """
        import torch

        from src.models.fidelity import COMPARED, diversity, frechet_distance, precision_recall

        real = torch.cat([batch[0].cpu() for batch, _ in limited(test, config.trainer.limit_test_batches)])
        drawn = model.draw(len(real), config.seed)
        train = packed.read_split(config.processed, "train")["rows"]
        columns = {"real": as_picture(real), "drawn": as_picture(drawn)}
        title = plots.Title(label=config.label, sample=config.sample)
        pictures = {name: picture.permute(0, 2, 3, 1).numpy() for name, picture in columns.items()}
        plots.image_grid(pictures, folder / "rows.png", **title)
        precision, recall = precision_recall(real[:COMPARED], drawn[:COMPARED])
        variety = diversity(real[:COMPARED], drawn[:COMPARED])
        correlations = [torch.corrcoef(rows.T.double()).nan_to_num() for rows in (real, drawn)]
        return Evaluated(
            {
                "frechet": frechet_distance(real, drawn),
                "frechet_real": frechet_distance(real, spread_over(train, len(real))),
                "precision": precision,
                "recall": recall,
                "diversity": variety,
                "collapsed": int(variety < COLLAPSED),
                "correlation_error": float((correlations[0] - correlations[1]).abs().mean()),
                "examples": len(drawn),
            }
        )

    def showcase(self, model: Any, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        return {"real": as_picture(batch[0].cpu()), "drawn": as_picture(model.draw(len(batch[0]), 0))}

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        """The rows in the units of the table."""
        mean, std = (np.array(signature[key], np.float32) for key in ("mean", "std"))
        rows = [dict(zip(signature["columns"], row.tolist(), strict=True)) for row in outputs[0] * std + mean]
        lines = [",".join(f"{value:.6g}" for value in row.values()) for row in rows]
        return Answer([",".join(signature["columns"]), *lines], rows)

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return "other"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        return f"""\
mean, std = np.array({signature["mean"]}, np.float32), np.array({signature["std"]}, np.float32)
latent = np.random.default_rng(0).standard_normal((16, {signature["latent"]}), np.float32)
rows = session.run(None, {{"latent": latent}})[0] * std + mean  # float32 [16, {len(signature["columns"])}]
"""


def as_picture(rows: Tensor) -> Tensor:
    """The first rows as one grey picture, a line each: fp32 [N, D] -> uint8 [1, 3, N, D]."""
    import torch

    grey = ((rows[:SHOWN] / DEVIATIONS + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return grey.expand(1, 3, -1, -1)


TASK = TableGeneration()
