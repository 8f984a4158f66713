"""int8 graphs, and the convolutions that replace transposed ones in exported graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from src import tasks
from src.common.errors import Failure
from src.common.paths import ROOT
from src.exporting import onnx_export, quantization
from src.exporting.convolutions import without_transposed
from tests.test_onnx_export import (
    IMAGE,
    OUTPUTS,
    TEXT,
    answers,
    generator,
    image_classifier,
    pictures,
    text_classifier,
    texts,
)


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


# --- int8 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[image_classifier, generator], ids=["classifier", "generator"])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The paths of a model's fp32 and int8 graphs."""
    folder = tmp_path_factory.mktemp("export")
    fp32, int8 = folder / "model.onnx", folder / "model.int8.onnx"
    onnx_export.write(request.param(), IMAGE, OUTPUTS, [pictures(4)], fp32)
    quantization.write_int8(fp32, IMAGE, [pictures(40), pictures(30)], int8)
    return fp32, int8


def test_int8_outputs_are_close_to_fp32_at_any_batch_size(graphs: tuple[Path, Path]) -> None:
    for count in (1, 9):
        fp32, int8 = (answers(path, IMAGE, pictures(count)) for path in graphs)
        assert int8.shape == fp32.shape
        assert 0 < np.abs(int8 - fp32).mean() < 0.03 * np.abs(fp32).mean()


def test_the_weights_are_int8(graphs: tuple[Path, Path]) -> None:
    def weights(path: Path) -> list[np.ndarray]:
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        return [array for array in arrays if array.ndim > 1 and array.size > 100]

    fp32, int8 = (weights(path) for path in graphs)
    assert {array.dtype.name for array in fp32} == {"float32"}
    assert {array.dtype.name for array in int8} == {"int8"}
    assert sum(array.size for array in int8) == sum(array.size for array in fp32)


def test_the_int8_bytes_depend_on_the_graph_and_examples_only(graphs: tuple[Path, Path], tmp_path: Path) -> None:
    fp32, int8 = graphs
    quantization.write_int8(fp32, IMAGE, [pictures(40), pictures(30)], tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == int8.read_bytes()
    for part in (str(ROOT), str(tmp_path.parent), "site-packages", "/tmp"):
        assert part.encode() not in int8.read_bytes(), part


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_export.write(text_classifier("mean"), TEXT, OUTPUTS, [texts(4, 9)], path)
    with pytest.raises(Failure, match=r"export\.int8: the exported model has LSTM layers"):
        quantization.write_int8(path, TEXT, [texts(4, 9)], tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.parametrize("graphs", [image_classifier], indirect=True)
def test_the_cost_of_a_classifier_is_measured_in_accuracy(graphs: tuple[Path, Path]) -> None:
    images = [pictures(count) for count in (20, 7)]
    outputs = [[answers(path, IMAGE, batch) for batch in images] for path in graphs]
    # The classes that the fp32 graph predicts, except for the first example.
    labels = [torch.from_numpy(output.argmax(1)) for output in outputs[0]]
    labels[0][0] = (labels[0][0] + 1) % 5
    batches = [(*batch, truth) for batch, truth in zip(images, labels, strict=True)]
    cost = quantization.cost(*graphs, IMAGE, batches, tasks.load("classification").int8_figures)
    correct = [
        sum((output.argmax(1) == truth.numpy()).sum() for output, truth in zip(graph_outputs, labels, strict=True))
        for graph_outputs in outputs
    ]
    assert correct[0] == 26
    fp32, int8 = (np.concatenate(graph_outputs) for graph_outputs in outputs)
    assert cost == pytest.approx(
        {
            "int8_difference": np.abs(fp32 - int8).mean(),
            "val_accuracy_onnx": 26 / 27,
            "val_accuracy_int8": correct[1] / 27,
        }
    )


@pytest.mark.parametrize("graphs", [generator], indirect=True)
def test_the_cost_of_pictures_is_measured_as_l1_to_the_target(graphs: tuple[Path, Path]) -> None:
    values, target = pictures(6), pictures(5)[0].repeat(2, 1, 1, 1)[:6]
    fp32, int8 = (answers(path, IMAGE, values) for path in graphs)
    cost = quantization.cost(*graphs, IMAGE, [(*values, target)], tasks.load("translation").int8_figures)
    expected = target.numpy() / 255
    assert cost == pytest.approx(
        {
            "int8_difference": np.abs(fp32 - int8).mean(),
            "val_l1_onnx": np.abs(fp32 - expected).mean(),
            "val_l1_int8": np.abs(int8 - expected).mean(),
        }
    )


@pytest.mark.parametrize("graphs", [generator], indirect=True)
def test_the_cost_without_targets_is_the_difference_only(graphs: tuple[Path, Path]) -> None:
    cost = quantization.cost(*graphs, IMAGE, [pictures(3)], tasks.load("generation").int8_figures)
    assert set(cost) == {"int8_difference"}


# --- transposed convolutions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8)])
def test_a_transposed_convolution_that_doubles_the_size_is_replaced(size: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1, bias=bias))
    replaced = without_transposed(original)
    x = torch.randn(2, 3, *size)
    assert not isinstance(replaced[0], nn.ConvTranspose2d)
    assert isinstance(original[0], nn.ConvTranspose2d)
    torch.testing.assert_close(replaced(x), original(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(2, 2, 7),
        nn.ConvTranspose2d(2, 2, 4, stride=2),
        nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1, dilation=3),
        nn.Conv2d(2, 2, 4, stride=2, padding=1),
    ],
    ids=["kernel", "padding", "output padding", "groups", "dilation", "not transposed"],
)
def test_other_layers_are_kept(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    assert without_transposed(model) is model


def test_an_exported_unet_has_no_transposed_convolution(tmp_path: Path) -> None:
    model = generator()
    onnx_export.write(model, IMAGE, OUTPUTS, [pictures(4)], tmp_path / "model.onnx")
    assert "ConvTranspose" not in operators(tmp_path / "model.onnx")
    assert any(isinstance(part, nn.ConvTranspose2d) for part in model.modules())
