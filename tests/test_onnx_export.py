"""ONNX graphs: the outputs of PyTorch at any batch size and length, the same bytes, no path of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.common.errors import Failure
from src.common.paths import ROOT
from src.configuration.schema import SGD, Adam, AdamW, Constant, Export
from src.data.kinds import Inputs, images, text
from src.exporting import onnx_export
from src.models.base import Model
from src.models.classifier import ImageClassifier
from src.models.lstm import TextClassifier
from src.models.pix2pix import Pix2Pix
from src.models.resnet import FastResNet

WORDS = 40
IMAGE, TEXT = images.KIND.inputs, text.KIND.inputs
OUTPUTS = ("output",)
Values = tuple[Tensor, ...]


def image_classifier(classes: int = 5, seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    return ImageClassifier(
        {"shape": [3, 32, 32], "classes": [str(c) for c in range(classes)], "mean": [0.5] * 3, "std": [0.2] * 3},
        network=lambda shape, classes: FastResNet(shape, classes, width=8),  # type: ignore[arg-type]
        optimizer=SGD(name="sgd", lr=0.1),
        schedule=Constant(name="constant"),
    )


def text_classifier(pooling: Any, layers: int = 1) -> TextClassifier:
    torch.manual_seed(0)
    model = TextClassifier(
        {"vocabulary": [str(number) for number in range(WORDS)], "classes": ["bad", "good"]},
        optimizer=AdamW(name="adamw", lr=0.1),
        schedule=Constant(name="constant"),
        embedding=6,
        hidden=5,
        layers=layers,
        pooling=pooling,
        pairs=101,
    )
    assert model.pairs is not None
    for votes in model.pairs.parameters():  # zero before training
        nn.init.normal_(votes)
    return model


def generator() -> Pix2Pix:
    torch.manual_seed(0)
    adam, constant = Adam(name="adam", lr=0.1), Constant(name="constant")
    return Pix2Pix({"shape": [3, 32, 32]}, optimizer=adam, schedule=constant, width=4)


def pictures(batch: int, length: int = 0) -> Values:
    return (torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch)),)


def texts(batch: int, length: int) -> Values:
    """Texts of random lengths up to `length`; the padding holds random words."""
    random = torch.Generator().manual_seed(100 * batch + length)
    lengths = torch.randint(1, length + 1, (batch,), generator=random)
    lengths[0] = length
    return torch.randint(WORDS, (batch, length), generator=random), lengths


@dataclass(frozen=True)
class Case:
    """A model, its inputs and the lengths to test it with."""

    model: Model
    inputs: Inputs
    draw: Callable[[int, int], Values]
    lengths: tuple[int, ...]

    def export(self, path: Path) -> Path:
        onnx_export.write(self.model, self.inputs, OUTPUTS, [self.draw(4, 9)], path)
        return path


TIMES = (1, 5, 50)
CASES: dict[str, Callable[[], Case]] = {
    "images": lambda: Case(image_classifier(), IMAGE, pictures, (0,)),
    "pairs": lambda: Case(generator(), IMAGE, pictures, (0,)),
    "mean": lambda: Case(text_classifier("mean"), TEXT, texts, TIMES),
    "max": lambda: Case(text_classifier("max"), TEXT, texts, TIMES),
    "mean_max of two layers": lambda: Case(text_classifier("mean_max", layers=2), TEXT, texts, TIMES),
    "attention": lambda: Case(text_classifier("attention"), TEXT, texts, TIMES),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case: Case = request.param()
    return case, case.export(tmp_path_factory.mktemp("export") / "model.onnx")


def answers(path: Path, inputs: Inputs, values: Values) -> np.ndarray:
    feed = {name: value.numpy() for name, value in zip(inputs.names, values, strict=True)}
    output: np.ndarray = onnx_export.session(path, threads=1).run(None, feed)[0]
    return output


def test_the_graph_equals_the_model_at_other_batch_sizes_and_lengths(exported: tuple[Case, Path]) -> None:
    case, path = exported
    original = onnx_export.answering(case.model)
    for batch in (1, 2, 7, 33):
        for length in case.lengths:
            values = case.draw(batch, length)
            with torch.inference_mode():
                expected = original(*values)[0].numpy()
            np.testing.assert_allclose(answers(path, case.inputs, values), expected, atol=1e-5, rtol=0)


def test_batch_and_length_are_named_free_dimensions(exported: tuple[Case, Path]) -> None:
    case, path = exported
    session = onnx_export.session(path)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    if case.inputs is TEXT:
        assert shapes == {"tokens": ["batch", "time"], "lengths": ["batch"]}
    else:
        assert shapes == {"image": ["batch", 3, 32, 32]}
    (output,) = session.get_outputs()
    assert output.name == "output"
    assert output.shape[0] == "batch"


def test_the_graph_holds_no_path_of_the_machine(exported: tuple[Case, Path]) -> None:
    content = exported[1].read_bytes()
    for part in (str(ROOT), str(Path.home()), "site-packages", "Traceback", ".py"):
        assert part.encode() not in content, part


@pytest.mark.parametrize("kind", ["images", "attention"])
def test_two_exports_of_a_model_are_the_same_bytes(kind: str, tmp_path: Path) -> None:
    first, second = (CASES[kind]().export(tmp_path / name).read_bytes() for name in ("first.onnx", "second.onnx"))
    assert first == second


@pytest.fixture(scope="module")
def picture_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES["images"]().export(tmp_path_factory.mktemp("export") / "model.onnx")


def test_the_largest_difference_of_a_correct_graph_is_returned(picture_graph: Path) -> None:
    difference = onnx_export.largest_difference(
        image_classifier(), IMAGE, [pictures(32), pictures(40)], picture_graph, 1e-5
    )
    assert 0 <= difference <= 1e-5


def test_a_graph_of_other_weights_is_refused(picture_graph: Path) -> None:
    with pytest.raises(Failure, match=rf"{picture_graph}: answers differ .* export\.tolerance is 0\.001; not exported"):
        onnx_export.largest_difference(image_classifier(seed=1), IMAGE, [pictures(8)], picture_graph, 1e-3)


def test_a_graph_with_another_output_shape_is_refused(picture_graph: Path) -> None:
    with pytest.raises(Failure, match=r"output has shape \(1, 5\) where PyTorch gives \(1, 7\)"):
        onnx_export.largest_difference(image_classifier(classes=7), IMAGE, [pictures(8)], picture_graph, 1e-3)


def test_a_graph_with_nan_outputs_is_refused(tmp_path: Path) -> None:
    broken = image_classifier()
    nn.init.constant_(broken.network.classify.weight, float("nan"))  # type: ignore[arg-type, union-attr]
    onnx_export.write(broken, IMAGE, OUTPUTS, [pictures(4)], tmp_path / "model.onnx")
    with pytest.raises(Failure, match="by up to nan"):
        onnx_export.largest_difference(image_classifier(), IMAGE, [pictures(8)], tmp_path / "model.onnx", 1e-3)


def test_latency_is_measured_per_batch_size_and_threads_are_restored(picture_graph: Path) -> None:
    threads, config = torch.get_num_threads(), Export(latency_batches=[1, 3], latency_seconds=0.01)
    graphs = {"one": picture_graph, "other": picture_graph}
    rows = onnx_export.latency(image_classifier(), IMAGE, [pictures(2)], graphs, config)
    assert [row["batch"] for row in rows] == [1, 3]
    for name in graphs:
        assert all(row[f"{name}_speedup"] == pytest.approx(row["pytorch_ms"] / row[f"{name}_ms"]) for row in rows)
    assert torch.get_num_threads() == threads
