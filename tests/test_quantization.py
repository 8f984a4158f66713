"""Graphs in int8, and the convolutions that stand for transposed ones in exported graphs."""

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
    """A model's graph in fp32 and in int8."""
    folder = tmp_path_factory.mktemp("export")
    whole, int8 = folder / "model.onnx", folder / "model.int8.onnx"
    onnx_export.write(request.param(), IMAGE, OUTPUTS, [pictures(4)], whole)
    quantization.write_int8(whole, IMAGE, [pictures(40), pictures(30)], int8)
    return whole, int8


def test_int8_answers_nearly_as_fp32_does_for_any_number_of_examples(graphs: tuple[Path, Path]) -> None:
    for count in (1, 9):
        whole, int8 = (answers(path, IMAGE, pictures(count)) for path in graphs)
        assert int8.shape == whole.shape
        assert 0 < np.abs(int8 - whole).mean() < 0.03 * np.abs(whole).mean()


def test_the_weights_are_bytes(graphs: tuple[Path, Path]) -> None:
    def weights(path: Path) -> list[np.ndarray]:
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        return [array for array in arrays if array.ndim > 1 and array.size > 100]

    whole, int8 = (weights(path) for path in graphs)
    assert {array.dtype.name for array in whole} == {"float32"}
    assert {array.dtype.name for array in int8} == {"int8"}
    assert sum(array.size for array in int8) == sum(array.size for array in whole)


def test_the_int8_bytes_depend_on_the_graph_and_the_examples_alone(graphs: tuple[Path, Path], tmp_path: Path) -> None:
    whole, int8 = graphs
    quantization.write_int8(whole, IMAGE, [pictures(40), pictures(30)], tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == int8.read_bytes()
    for trace in (str(ROOT), str(tmp_path.parent), "site-packages", "/tmp"):
        assert trace.encode() not in int8.read_bytes(), trace


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_export.write(text_classifier("mean"), TEXT, OUTPUTS, [texts(4, 9)], path)
    with pytest.raises(Failure, match=r"export\.int8: the exported model has LSTM layers"):
        quantization.write_int8(path, TEXT, [texts(4, 9)], tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.parametrize("graphs", [image_classifier], indirect=True)
def test_the_cost_of_a_classifier_is_told_in_right_answers(graphs: tuple[Path, Path]) -> None:
    images = [pictures(count) for count in (20, 7)]
    each = [[answers(path, IMAGE, batch) for batch in images] for path in graphs]
    # Labels that the fp32 graph gets right, but for the first of all.
    labels = [torch.from_numpy(answer.argmax(1)) for answer in each[0]]
    labels[0][0] = (labels[0][0] + 1) % 5
    batches = [(*batch, truth) for batch, truth in zip(images, labels, strict=True)]
    found = quantization.cost(*graphs, IMAGE, batches, tasks.load("classification").int8_figures)
    right = [
        sum((answer.argmax(1) == truth.numpy()).sum() for answer, truth in zip(answered, labels, strict=True))
        for answered in each
    ]
    assert right[0] == 26
    whole, int8 = (np.concatenate(answered) for answered in each)
    assert found == pytest.approx(
        {
            "int8_difference": np.abs(whole - int8).mean(),
            "val_accuracy_onnx": 26 / 27,
            "val_accuracy_int8": right[1] / 27,
        }
    )


@pytest.mark.parametrize("graphs", [generator], indirect=True)
def test_the_cost_of_pictures_is_told_as_their_distance_to_the_target(graphs: tuple[Path, Path]) -> None:
    given, target = pictures(6), pictures(5)[0].repeat(2, 1, 1, 1)[:6]
    whole, int8 = (answers(path, IMAGE, given) for path in graphs)
    found = quantization.cost(*graphs, IMAGE, [(*given, target)], tasks.load("translation").int8_figures)
    true = target.numpy() / 255
    assert found == pytest.approx(
        {
            "int8_difference": np.abs(whole - int8).mean(),
            "val_l1_onnx": np.abs(whole - true).mean(),
            "val_l1_int8": np.abs(int8 - true).mean(),
        }
    )


@pytest.mark.parametrize("graphs", [generator], indirect=True)
def test_where_there_is_nothing_to_compare_with_only_the_difference_is_told(graphs: tuple[Path, Path]) -> None:
    found = quantization.cost(*graphs, IMAGE, [pictures(3)], tasks.load("generation").int8_figures)
    assert set(found) == {"int8_difference"}


# --- transposed convolutions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8)])
def test_a_convolution_stands_for_a_transposed_one_that_doubles_the_size(size: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1, bias=bias))
    made = without_transposed(original)
    x = torch.randn(2, 3, *size)
    assert not isinstance(made[0], nn.ConvTranspose2d)
    assert isinstance(original[0], nn.ConvTranspose2d)
    torch.testing.assert_close(made(x), original(x))


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
def test_other_layers_stay_as_they_are(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    assert without_transposed(model) is model


def test_an_exported_unet_has_no_transposed_convolution(tmp_path: Path) -> None:
    model = generator()
    onnx_export.write(model, IMAGE, OUTPUTS, [pictures(4)], tmp_path / "model.onnx")
    assert "ConvTranspose" not in operators(tmp_path / "model.onnx")
    assert any(isinstance(part, nn.ConvTranspose2d) for part in model.modules())
