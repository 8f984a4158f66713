"""Autoencoders: latent size, loss, export, and the metrics of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src import tasks
from src.common.errors import Failure
from src.configuration.composing import compose
from src.configuration.schema import Adam, Constant
from src.data import packed
from src.data.kinds.images import ImageBatches
from src.data.writing import write_packed
from src.exporting import onnx_export
from src.models.autoencoder import Autoencoder, ConvCoder, DenseCoder, psnr
from src.tasks import reconstruction

SHAPE = [1, 8, 8]
CODERS: dict[str, Any] = {
    "dense": lambda shape: DenseCoder(shape, hidden=[20], latent=5, dropout=0.5),
    "conv": lambda shape: ConvCoder(shape, widths=[4, 6], latent=5),
}


def autoencoder(kind: str) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        {"shape": SHAPE},
        network=CODERS[kind],
        optimizer=Adam(name="adam", lr=0.01),
        schedule=Constant(name="constant"),
    ).eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CODERS)
def test_images_pass_through_the_latent_dimension(kind: str) -> None:
    model, batch = autoencoder(kind), images(3)
    assert model.encode(batch).shape == (3, 5)
    output = model.answer(batch)
    assert output.shape == batch.shape
    assert 0 <= float(output.detach().min()) <= float(output.detach().max()) <= 1
    torch.testing.assert_close(model.network.decode(model.encode(batch)), output)  # type: ignore[operator]


@pytest.mark.parametrize("kind", CODERS)
def test_an_autoencoder_is_exported(kind: str, tmp_path: Path) -> None:
    model = autoencoder(kind)
    task = tasks.load(model.task)
    inputs, examples = task.inputs("images"), [(images(4),)]
    onnx_export.write(model, inputs, task.outputs, examples, tmp_path / "m.onnx")
    assert onnx_export.largest_difference(model, inputs, examples, tmp_path / "m.onnx", 1e-5) < 1e-5


def test_the_loss_is_the_mse_of_pixels_from_0_to_1_weighted_by_images() -> None:
    model, batch = autoencoder("conv"), images(6)
    loss = model.loss((batch, torch.zeros(6)), "val")
    error = (model.answer(batch).detach() - batch / 255).square()
    torch.testing.assert_close(loss, error.mean())
    total, count = model.val_sums[model.means["val"].index("loss")].tolist()
    assert total == pytest.approx(6 * float(error.mean()), rel=1e-5)
    assert count == 6


def test_the_psnr_of_an_epoch_is_the_mean_of_the_images_own() -> None:
    model, batch = autoencoder("conv"), images(6)
    batch[:3] = 128  # some are easier than others
    model.loss((batch, torch.zeros(6)), "val")
    errors = (model.answer(batch).detach() - batch / 255).square().flatten(1).mean(1)
    total, _ = model.val_sums[model.means["val"].index("psnr")].tolist()
    assert total == pytest.approx(float((-10 * errors.log10()).sum()), rel=1e-4)


def test_psnr_is_in_decibels_and_at_most_100() -> None:
    assert psnr(torch.tensor([1.0, 0.01, 0.0])).tolist() == pytest.approx([0.0, 20.0, 100.0])


def test_more_halvings_than_the_image_allows_are_refused() -> None:
    with pytest.raises(Failure, match="3 halvings do not divide 28x28; give fewer"):
        ConvCoder([1, 28, 28], widths=[4, 4, 4])


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_the_linear_error_is_that_of_the_best_projection() -> None:
    """Images of rank three: no error with three components; with two, the smallest eigenvalue is lost."""
    random = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 40, (3, 16), generator=random)
    weights = torch.randint(0, 3, (500, 3), generator=random)
    mixtures = (weights @ patterns).to(torch.uint8).view(-1, 1, 4, 4)
    assert reconstruction.linear_error(mixtures, mixtures, 3) == pytest.approx(0, abs=1e-12)
    eigenvalues = torch.linalg.eigvalsh((mixtures.flatten(1).double() / 255).T.cov(correction=0))
    assert reconstruction.linear_error(mixtures, mixtures, 2) == pytest.approx(float(eigenvalues[-3]) / 16, rel=1e-6)


def test_the_evaluation_reports_errors_and_draws_a_grid(tmp_path: Path) -> None:
    config = compose(
        ["experiment=mnist_autoencoder", "output=out", f"data_folder={tmp_path}", "evaluation.judge_steps=5"]
    )
    arrays = {"images": images(40).numpy(), "labels": (torch.arange(40) % 2).numpy()}
    meta = write_packed(
        packed.Packed(dict.fromkeys(packed.SPLITS, arrays), {"kind": "images", "classes": ["a", "b"]}),
        config.processed,
        config={},
        source={},
    )
    split = packed.read_split(config.processed, "test")
    test = ImageBatches(split, meta, config.loader, train=False)
    model = autoencoder("dense")
    folder = tmp_path / "evaluation"
    folder.mkdir()
    evaluated = reconstruction.TASK.evaluate(model, test, config, meta, folder)
    metrics, pairs = evaluated.metrics, evaluated.pairs
    error = (model.answer(split["images"]) - split["images"] / 255).square().mean().detach()
    assert metrics["mse"] == pytest.approx(float(error), rel=1e-5)
    assert metrics["psnr"] == pytest.approx(float(psnr(error)), abs=0.1)
    assert metrics["mse_pca"] < metrics["mse"]  # untrained
    assert (metrics["latent"], metrics["examples"], len(pairs)) == (5, 40, 40)
    recognised = sum(row["actual"] == row["predicted"] for row in pairs)
    assert metrics["recognised"] == recognised / 40
    assert {path.name for path in folder.iterdir()} == {"grid.png", "latent.png"}
