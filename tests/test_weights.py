"""The file of a model's weights: exact, reproducible, refused when damaged or of another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from src.common.errors import Failure
from src.configuration.composing import compose
from src.configuration.schema import Build
from src.models import weights

IMAGES = {"shape": [3, 32, 32], "classes": ["cat", "dog"], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


def image_model(override: str = "model.network.width=4") -> Build:
    return compose(["experiment=cifar10_resnet", "output=unused", override]).model


def test_saved_weights_are_loaded_to_the_bit_in_eval_mode(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = image_model()(IMAGES)
    model.network.blocks[0].enter_norm.running_mean.normal_()  # buffers are saved as well
    model.to(memory_format=torch.channels_last)
    sha256 = weights.save(model, tmp_path / "new" / "folder", epochs=3)
    torch.manual_seed(2)
    loaded = weights.load(image_model(), IMAGES, tmp_path / "new" / "folder")
    assert not loaded.training
    expected, actual = model.state_dict(), loaded.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) and actual[key].dtype == expected[key].dtype for key in expected)
    note = weights.read_note(tmp_path / "new" / "folder")
    assert note == {"sha256": sha256, "epochs": 3, "parameters": sum(p.numel() for p in model.parameters())}


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    model = image_model()(IMAGES)
    first, second = tmp_path / "first", tmp_path / "second"
    assert weights.save(model, first, epochs=3) == weights.save(model, second, epochs=3)
    for name in (weights.NAME, weights.NOTE):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert str(tmp_path).encode() not in (first / weights.NOTE).read_bytes()


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_weights_with_a_flipped_bit_are_refused(tmp_path: Path, position: float) -> None:
    weights.save(image_model()(IMAGES), tmp_path)
    path = tmp_path / weights.NAME
    content = bytearray(path.read_bytes())
    content[round(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(Failure, match=rf"{path} is damaged .*train again"):
        weights.load(image_model(), IMAGES, tmp_path)


@pytest.mark.parametrize("other", ["model.network.width=8", "model=resnet18"])
def test_weights_of_another_architecture_are_refused(tmp_path: Path, other: str) -> None:
    weights.save(image_model()(IMAGES), tmp_path)
    with pytest.raises(Failure, match="is of another model than the configuration's") as caught:
        weights.load(image_model(other), IMAGES, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_missing_weights_and_unreadable_notes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"model\.json can't be read .*dvc repro"):
        weights.load(image_model(), IMAGES, tmp_path)
    weights.save(image_model()(IMAGES), tmp_path)
    (tmp_path / weights.NAME).unlink()
    with pytest.raises(Failure, match=r"model\.safetensors is missing"):
        weights.load(image_model(), IMAGES, tmp_path)
    (tmp_path / weights.NOTE).write_text(json.dumps({"sha256": 0})[:-3])
    with pytest.raises(Failure, match=r"model\.json can't be read"):
        weights.read_note(tmp_path)
