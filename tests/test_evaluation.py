"""Metrics of the test split, on cases small enough to be calculated by hand."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from src.common import hardware
from src.configuration.schema import Config
from src.data import packed
from src.data.batching import Batches, limited
from src.data.kinds.images import ImageBatches, ImageLoader
from src.data.kinds.text import TextBatches, TextLoader
from src.data.sets.facade_palette import FACADE_PALETTE
from src.evaluate import evaluate
from src.models import weights
from src.reporting import tables
from src.reporting.plots import Title
from src.scoring.segmenter import segmentation_scores, train_segmenter
from src.tasks import Evaluated, classification, translation
from src.tasks.classification import ClassificationOptions
from src.tasks.translation import TranslationOptions
from src.tracking.tracker import Tracker
from tests.tiny_data import noise_digits

CLASSES = ["cat", "dog", "ship"]
TITLE = Title(label="test", sample=True)

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
PREDICTED = [0, 0, 1, 1, 1, 0]
CONFIDENCE = [0.9, 0.6, 0.7, 0.8, 0.5, 0.95]
INDICES = torch.tensor([5, 4, 3, 2, 1, 0])  # of the examples in the split


def probabilities() -> Tensor:
    """CONFIDENCE for the predicted class, the remainder shared by the others; float [6, 3]."""
    confidence = torch.tensor(CONFIDENCE)
    scores = ((1 - confidence) / 2)[:, None].repeat(1, 3)
    scores[torch.arange(6), torch.tensor(PREDICTED)] = confidence
    return scores


def images(count: int) -> dict[str, Tensor]:
    return {"images": torch.zeros(count, 3, 8, 8, dtype=torch.uint8), "labels": torch.arange(count) % 3}


def texts() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Six texts of one to six words; a text repeats the word for its own index."""
    lengths = torch.tensor([3, 1, 6, 2, 5, 4])
    tokens = torch.arange(6).repeat_interleave(lengths).to(torch.int32) + 2
    split = {"tokens": tokens, "offsets": torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]), "labels": LABELS}
    words = ["zero", "one", "two", "three", "four", "five"]
    return split, {"kind": "text", "classes": CLASSES, "vocabulary": ["<unk>", "<pad>", *words]}


# --- classification ---------------------------------------------------------------------------------------------------


def test_classification_metrics_equal_those_calculated_by_hand(tmp_path: Path) -> None:
    meta = {"kind": "images", "classes": CLASSES}
    evaluated = classification.report(
        probabilities(), LABELS, INDICES, images(6), meta, ClassificationOptions(), tmp_path, TITLE
    )
    scores, pairs = evaluated.metrics, evaluated.pairs
    # recall and precision: cat 2/3 and 2/3, dog 2/2 and 2/3, ship 0 and 0
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["precision"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores["recall"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    truth = [0.9, 0.6, (1 - 0.7) / 2, 0.8, 0.5, (1 - 0.95) / 2]
    assert scores["loss"] == pytest.approx(-sum(math.log(p) for p in truth) / 6)
    # 15 bins: every confidence is alone in its bin
    gaps = [0.1, 0.4, 0.7, 0.2, 0.5, 0.95]
    assert scores["calibration_error"] == pytest.approx(sum(gaps) / 6)
    assert scores["examples"] == 6
    assert [(row["actual"], row["predicted"]) for row in pairs] == [
        (CLASSES[actual], CLASSES[predicted]) for actual, predicted in zip(LABELS.tolist(), PREDICTED, strict=True)
    ]
    names = {"confusion.png", "calibration.csv", "calibration.png", "mistakes.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_worst_mistakes_are_the_most_confident_ones(tmp_path: Path) -> None:
    split, meta = texts()
    classification.report(probabilities(), LABELS, INDICES, split, meta, ClassificationOptions(), tmp_path, TITLE)
    page = (tmp_path / "mistakes.md").read_text()
    assert re.findall(r"## \d+\. (\w+) ([\d.]+)%, is (\w+)", page) == [("cat", "95.0", "ship"), ("dog", "70.0", "cat")]
    # examples 5 and 2, at the indices 0 and 3 of the split
    assert re.findall(r"“(.*)”", page) == ["zero zero zero", "three three"]

    classification.report(
        probabilities(), LABELS, INDICES, split, meta, ClassificationOptions(mistakes=1), tmp_path, TITLE
    )
    assert re.findall(r"“(.*)”", (tmp_path / "mistakes.md").read_text()) == ["zero zero zero"]


def test_a_classifier_without_mistakes_is_reported(tmp_path: Path) -> None:
    perfect = torch.eye(3)[LABELS]
    meta = {"kind": "images", "classes": CLASSES}
    evaluated = classification.report(
        perfect, LABELS, INDICES, images(6), meta, ClassificationOptions(), tmp_path, TITLE
    )
    scores = evaluated.metrics
    assert {scores[name] for name in ("accuracy", "precision", "recall", "f1")} == {1.0}
    assert scores["loss"] == scores["calibration_error"] == 0


class FirstWordClassifier(nn.Module):
    """Predicts the label of the text that the first word names, with certainty."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return 50 * torch.eye(3)[LABELS[tokens[:, 0] - 2]]


def test_probabilities_come_with_the_indices_of_their_examples() -> None:
    split, meta = texts()
    batches = TextBatches(split, meta, TextLoader(batch_size=2, eval_batch_size=4), train=False)
    scores, labels, indices = classification.probabilities(FirstWordClassifier(), batches)
    assert indices.tolist() == [1, 3, 0, 5, 4, 2]  # by length
    assert torch.equal(labels, LABELS[indices])
    assert torch.equal(scores.argmax(1), labels)
    torch.testing.assert_close(scores.sum(1), torch.ones(6))


@pytest.mark.parametrize(
    ("limit", "count"), [(None, 5), (1, 1), (3, 3), (9, 5), (1.0, 5), (0.6, 3), (0.01, 1), (0.0, 1), (0, 1)]
)
def test_a_limit_counts_batches_or_is_a_fraction_and_leaves_one(limit: int | float | None, count: int) -> None:
    batches = ImageBatches(images(10), {"kind": "images"}, ImageLoader(batch_size=2, eval_batch_size=2), train=False)
    batches_of_limit = list(limited(batches, limit))
    assert [indices.tolist() for _, indices in batches_of_limit] == [[2 * i, 2 * i + 1] for i in range(count)]
    assert all(torch.equal(batch[1], indices % 3) for batch, indices in batches_of_limit)


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A network without training, as the train stage leaves it on a GPU; 21 validation and 22 test images of noise."""
    monkeypatch.setattr(Tracker, "join", lambda *_: contextlib.nullcontext(MagicMock()))
    config = noise_digits(tmp_path, "trainer.accelerator=gpu", "trainer.precision=32")
    weights.save(config.model(packed.read_meta(config.processed)), config.folder / "train")
    tables.write_csv(config.folder / "train" / "history.csv", [{"epoch": 1, "train_loss": 1.0}])
    return config


def test_evaluate_measures_the_test_split_and_says_that_there_is_no_gpu(
    trained: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    evaluate(trained)
    assert json.loads((trained.folder / "metrics.json").read_text())["examples"] == 22
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "trainer.accelerator: gpu, but torch sees no CUDA device here: computed on the CPU"


def test_evaluate_computes_on_the_configured_device(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: it takes every call, and computes nothing."""
    asked: list[str] = []
    devices: set[str] = set()

    def device(accelerator: str) -> torch.device:
        asked.append(accelerator)
        return torch.device("meta")

    def measure(model: nn.Module, test: Batches, *_: Any) -> Evaluated:
        ((images, labels), *_rest) = test
        devices.update(str(tensor.device) for tensor in (images, labels, model(images), *model.state_dict().values()))
        return Evaluated({})

    monkeypatch.setattr(hardware, "device_here", device)
    monkeypatch.setattr(classification.TASK, "evaluate", measure)
    evaluate(trained)
    assert (asked, devices) == (["gpu"], {"meta"})


# --- labels on pictures -----------------------------------------------------------------------------------------------

COLOURS = torch.tensor(list(FACADE_PALETTE.values()))


@pytest.mark.parametrize("noise", [0, 7])
def test_a_palette_colour_is_its_class_despite_a_little_noise(noise: int) -> None:
    random = torch.Generator().manual_seed(0)
    classes = torch.randint(len(COLOURS), (2, 16, 16), generator=random)
    maps = COLOURS[classes].permute(0, 3, 1, 2)
    maps = maps + torch.randint(-noise, noise + 1, maps.shape, generator=random)
    assert torch.equal(translation.labels_of(maps.clamp(0, 255).to(torch.uint8)), classes)


def test_another_colour_is_the_class_of_the_nearest_palette_colour() -> None:
    maps = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(maps.permute(0, 2, 3, 1).reshape(-1, 3).double(), COLOURS.double())
    nearest = distances.argmin(1).view(2, 16, 16)
    assert torch.equal(translation.labels_of(maps), nearest)


def test_segmentation_scores_equal_those_calculated_by_hand() -> None:
    confusion = torch.tensor([[3, 1, 0], [1, 2, 0], [0, 0, 0]])
    assert segmentation_scores(confusion) == pytest.approx(
        {"pixel_accuracy": 5 / 7, "class_accuracy": (3 / 4 + 2 / 3) / 2, "class_iou": (3 / 5 + 2 / 4) / 2}
    )


def test_a_class_that_does_not_occur_counts_in_iou_but_not_in_accuracy() -> None:
    scores = segmentation_scores(torch.tensor([[3, 1], [0, 0]]))
    assert scores == pytest.approx({"pixel_accuracy": 3 / 4, "class_accuracy": 3 / 4, "class_iou": (3 / 4 + 0) / 2})


def coloured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of 8x8 patches of blue, green or red, uint8 [N, 3, 32, 32], and the patches' classes [N, 32, 32]."""
    patches = torch.randint(3, (count, 4, 4), generator=torch.Generator().manual_seed(seed))
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return COLOURS[[0, 5, 10]][labels].permute(0, 3, 1, 2).to(torch.uint8), labels


def segmenter(epochs: int, seed: int = 0) -> nn.Module:
    return train_segmenter(*coloured(32, seed=0), 3, width=8, epochs=epochs, seed=seed, autocast=None, batch_size=4)


def test_the_segmenter_learns_to_distinguish_colours() -> None:
    photos, labels = coloured(8, seed=1)
    model = segmenter(epochs=20)
    with torch.inference_mode():
        predicted = model(photos / 255).argmax(1)
    assert float((predicted == labels).double().mean()) > 0.95


def test_the_segmenter_is_reproducible_and_leaves_the_random_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = segmenter(epochs=2).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = segmenter(epochs=2).state_dict(), segmenter(epochs=2, seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classify.weight"], other["classify.weight"])


def test_all_labels_are_recovered_when_generated_photos_are_the_real_ones() -> None:
    maps, labels = coloured(8, seed=0)
    train = {"input": maps, "target": 255 - maps}
    evaluated = translation.label_recovery(train, maps, 255 - maps, 255 - maps, epochs=20, seed=0, bf16=False)
    scores, pairs = evaluated.metrics, evaluated.pairs
    assert scores["labels_recovered"] == 1
    assert scores["labels_pixel_accuracy_generated"] == scores["labels_pixel_accuracy_real"] > 0
    assert len(pairs) == 8 * translation.LABELS_APART**2
    assert pairs[0]["actual"] == ["background", "sill", "pillar"][labels[0, 2, 2]]
    assert {row["predicted"] for row in pairs} <= set(FACADE_PALETTE)


def test_the_recovery_ratio_is_nan_when_real_photos_score_zero() -> None:
    """The segmenter learns colours, and the real photos are blue where the label maps are red."""
    maps, _ = coloured(16, seed=0)
    blue, red = (COLOURS[c].view(1, 3, 1, 1).expand(2, 3, 32, 32).to(torch.uint8) for c in (0, 10))
    train = {"input": maps, "target": maps}
    scores = translation.label_recovery(train, red, blue, blue, epochs=20, seed=0, bf16=False).metrics
    assert scores["labels_pixel_accuracy_real"] == 0
    assert math.isnan(scores["labels_recovered"])


# --- pictures ---------------------------------------------------------------------------------------------------------


def noise(count: int = 3) -> Tensor:
    return torch.randint(10, 246, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def refuse_constant(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_the_infinite_psnr_of_identical_pictures_is_written_as_null(tmp_path: Path) -> None:
    targets = noise()
    scores = translation.report(targets, targets, targets, TranslationOptions(), tmp_path, TITLE)
    assert scores["l1"] == 0
    assert scores["ssim"] == pytest.approx(1)
    assert scores["psnr"] == math.inf
    assert (tmp_path / "grid.png").stat().st_size > 0
    tables.write_metrics(tmp_path / "metrics.json", scores)
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse_constant)
    assert written == {"l1": 0.0, "psnr": None, "ssim": 1.0, "examples": 3}


def test_translation_metrics_are_means_over_the_pictures(tmp_path: Path) -> None:
    targets = noise(2)
    pictures = targets.clone()
    pictures[0] += 10
    pictures[1] -= 5
    scores = translation.report(targets, pictures, targets, TranslationOptions(), tmp_path, TITLE)
    assert scores["l1"] == pytest.approx((10 + 5) / 2 / 255)
    assert scores["psnr"] == pytest.approx((20 * math.log10(255 / 10) + 20 * math.log10(255 / 5)) / 2, rel=1e-5)
    assert 0.9 < scores["ssim"] < 1
    assert scores["examples"] == 2
