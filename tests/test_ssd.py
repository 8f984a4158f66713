"""SSD: default boxes, matching, loss and suppression against hand-made cases and torchvision's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou

from src.common.errors import Failure
from src.configuration.composing import compose
from src.data import kinds
from src.data.fetching.pretrained import obtain_pretrained
from src.exporting import onnx_export
from src.models import ssd
from src.models.ssd import BACKGROUND, IGNORED, SSD, TimmSSD, TorchvisionSSD
from src.tasks.detection import TASK

META = {"kind": "boxes", "shape": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "classes": ["a", "b", "c"]}


def model(*overrides: str) -> SSD:
    config = compose(
        [
            "experiment=coco_ssd",
            "output=out",
            "model.network.width=8",
            "model.candidates=50",
            "model.detections=20",
            *overrides,
        ]
    )
    torch.manual_seed(0)
    built: SSD = config.model(META)
    return built


def random_boxes(count: int, seed: int = 0, size: float = 64) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat([corners.amin(1), corners.amax(1) + 1], 1)


# --- default boxes ----------------------------------------------------------------------------------------------------


def test_the_default_boxes_of_a_grid() -> None:
    boxes = ssd.default_boxes([(1, 2), (1, 1)], (20, 40), (0.5, 0.8), [4.0])
    assert boxes.shape == (2 * 4 + 4, 4)
    # Two positions in the first level, with their centres at (10, 10) and (30, 10); sides of half the shorter side.
    root = math.sqrt(10 * 16)
    expected = [[5, 5, 15, 15], [10 - root / 2, 10 - root / 2, 10 + root / 2, 10 + root / 2]]
    expected += [[0, 7.5, 20, 12.5], [7.5, 0, 12.5, 20]]
    torch.testing.assert_close(boxes[:4], torch.tensor(expected))
    torch.testing.assert_close(boxes[4:8], boxes[:4] + torch.tensor([20.0, 0, 20, 0]))
    torch.testing.assert_close(boxes[8], torch.tensor([12.0, 2, 28, 18]))


def test_offsets_are_those_of_torchvision_and_lead_back() -> None:
    from torchvision.models.detection._utils import BoxCoder

    boxes, anchors = random_boxes(50), random_boxes(50, seed=1)
    offsets = ssd.encode(boxes, anchors)
    torch.testing.assert_close(offsets, BoxCoder((10.0, 10.0, 5.0, 5.0)).encode_single(boxes, anchors))
    torch.testing.assert_close(ssd.decode(offsets, anchors), boxes, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"])
def test_torchvision_s_networks_have_their_default_boxes(architecture: Any) -> None:
    size = TorchvisionSSD.SIZES[architecture]
    network = TorchvisionSSD((3, size, size), 20, architecture=architecture).eval()
    count = {"ssd300_vgg16": 8732, "ssdlite320_mobilenet_v3_large": 3234}[architecture]  # as published
    assert network.anchors.shape == (count, 4)
    with torch.inference_mode():
        offsets, logits = network(torch.zeros(1, 3, size, size))
    assert offsets.shape == (1, count, 4)
    assert logits.shape == (1, count, 21)


def test_another_size_than_torchvision_s_is_refused_with_the_remedy() -> None:
    with pytest.raises(Failure, match=r"takes images of 300x300, not 64x64: set data.size=\[300,300\]"):
        TorchvisionSSD((3, 64, 64), 3, architecture="ssd300_vgg16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.network.backbone=resnet1800", "timm can't build 'resnet1800'"),
        ("model.network.strides=[8,9]", "test_resnet has no map of stride 9; it has 2, 4, 8, 16, 32"),
    ],
)
def test_a_network_that_timm_has_not_is_refused(override: str, message: str) -> None:
    with pytest.raises(Failure, match=message):
        model(override)


@pytest.mark.parametrize("top_down", [False, True])
def test_each_position_has_its_default_boxes(top_down: bool) -> None:
    network = TimmSSD(
        (3, 64, 96), 2, backbone="test_resnet", extra_levels=1, width=8, top_down=top_down, ratios=[2.0, 3.0]
    )
    with torch.inference_mode():
        network.eval()
        maps = network.features(torch.rand(1, 3, 64, 96))
        offsets, logits = network(torch.rand(1, 3, 64, 96))
    assert [tuple(part.shape) for part in maps] == [(1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3), (1, 8, 1, 2)]
    count = 6 * (96 + 24 + 6 + 2)
    assert network.anchors.shape == (count, 4)
    assert (offsets.shape, logits.shape) == ((1, count, 4), (1, count, 3))


# --- matching and loss ------------------------------------------------------------------------------------------------

ANCHORS = ssd.default_boxes([(8, 8), (4, 4), (2, 2)], (64, 64), (0.2, 0.8), [2.0])


def targets(*images: list[tuple[list[float], int]], ignored: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    most = max(1, *(len(image) for image in images))
    boxes, labels = torch.zeros(len(images), most, 4), torch.full((len(images), most), -1)
    for row, image in enumerate(images):
        for column, (box, label) in enumerate(image):
            boxes[row, column], labels[row, column] = torch.tensor(box), label
    flags = torch.zeros(len(images), most, dtype=torch.bool)
    for row, column in ignored or ():
        flags[row, column] = True
    return boxes, labels, flags


SCENE = [([4.0, 4, 20, 18], 0), ([30.0, 8, 62, 50], 2), ([10.0, 40, 14, 44], 1)]


def test_overlaps_are_torchvision_s() -> None:
    boxes = random_boxes(7)
    iou, covered = ssd.overlaps(boxes[None], ANCHORS)
    torch.testing.assert_close(iou[0], box_iou(boxes, ANCHORS))
    assert ((covered >= 0) & (covered <= 1.001)).all()


def test_matches_are_torchvision_s_image_by_image() -> None:
    images = [SCENE, SCENE[1:2], [(box.tolist(), 1) for box in random_boxes(2, seed=3)]]
    matched = ssd.match(*targets(*images), ANCHORS, 0.5)
    for row, image in zip(matched, images, strict=True):
        boxes = torch.tensor([box for box, _ in image])
        assert torch.equal(row, SSDMatcher(0.5)(box_iou(boxes, ANCHORS)))


def test_a_box_that_overlaps_nothing_well_has_its_best_default_box() -> None:
    matched = ssd.match(*targets([SCENE[2]]), ANCHORS, 0.5)
    assert (matched >= 0).sum() == 1
    assert int(matched[0].argmax()) == int(box_iou(torch.tensor([SCENE[2][0]]), ANCHORS).argmax())


def test_two_objects_at_one_place_share_the_default_boxes() -> None:
    """Both would take the same best one: the one that overlaps it more has it."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [40.0, 40, 50, 50]])
    matched = ssd.match(*targets([([0.0, 0, 8, 10], 0), ([0.0, 0, 9, 10], 1)]), anchors, 0.5)
    assert matched.tolist() == [[1, BACKGROUND]]


def test_an_image_without_objects_is_all_background() -> None:
    assert (ssd.match(*targets([]), ANCHORS, 0.5) == BACKGROUND).all()


def test_nothing_is_learnt_within_a_crowd() -> None:
    crowd = ([0.0, 0, 32, 64], 1)
    matched = ssd.match(*targets([crowd, SCENE[1]], ignored=[(0, 0)]), ANCHORS, 0.5)[0]
    inside = ssd.overlaps(torch.tensor([[crowd[0]]]), ANCHORS)[1][0, 0] > 0.5
    assert (matched[inside & (matched < 0)] == IGNORED).all()
    assert (matched[~inside] != IGNORED).all()
    assert set(matched.tolist()) == {IGNORED, BACKGROUND, 1}


def test_the_hardest_negatives_count_three_for_each_positive() -> None:
    loss = torch.tensor([[5.0, 1, 9, 3, 2, 4], [5.0, 1, 9, 3, 2, 4]])
    positive = torch.tensor([[True, False, False, False, False, False], [False] * 6])
    negative = ~positive
    negative[0, 2] = False  # ignored
    chosen = ssd.hardest(loss, positive, negative, 3.0)
    assert chosen.tolist() == [[False, False, False, True, True, True], [True, False, True, False, False, True]]


def test_the_loss_is_torchvision_s() -> None:
    """Its `compute_loss` on the same outputs, default boxes and matches; hard negatives included."""
    boxes, labels, ignored = targets(SCENE, SCENE[:2])
    built = model()
    built.network.anchors = ANCHORS
    random = torch.Generator().manual_seed(0)
    offsets = torch.randn(2, len(ANCHORS), 4, generator=random)
    logits = torch.randn(2, len(ANCHORS), 4, generator=random)
    loss = built.loss((offsets, logits), (boxes, labels, ignored), "train")

    reference = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    known = [labels[row] >= 0 for row in range(2)]
    theirs = reference.compute_loss(
        [{"boxes": boxes[i][k], "labels": labels[i][k] + 1} for i, k in enumerate(known)],
        {"bbox_regression": offsets, "cls_logits": logits},
        [ANCHORS, ANCHORS],
        [SSDMatcher(0.5)(box_iou(boxes[i][k], ANCHORS)) for i, k in enumerate(known)],
    )
    torch.testing.assert_close(loss, theirs["classification"] + theirs["bbox_regression"])
    _, class_loss, box_loss = (built.train_sums[:, 0] / built.train_sums[:, 1]).float()
    torch.testing.assert_close(class_loss, theirs["classification"])
    torch.testing.assert_close(box_loss, theirs["bbox_regression"])


def test_images_without_objects_have_a_loss_and_gradients_without_nan() -> None:
    built = model()
    loss = built.step_loss((torch.zeros(2, 3, 64, 64, dtype=torch.uint8), *targets([], [])))
    loss.backward()
    assert loss > 0
    gradients = [p.grad for p in built.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


# --- detections -------------------------------------------------------------------------------------------------------


def test_suppression_is_torchvision_s_image_by_image() -> None:
    boxes = torch.stack([random_boxes(40, seed) for seed in (0, 1)])
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(2))
    kept = torch.ops.pipeline.not_suppressed(boxes, scores, 0.3)
    for row in range(2):
        expected = batched_nms(boxes[row], scores[row], torch.zeros(40, dtype=torch.long), 0.3)
        assert torch.nonzero(kept[row]).flatten().tolist() == sorted(expected.tolist())


def outputs_for(built: SSD, *found: tuple[int, int, float]) -> tuple[Tensor, Tensor]:
    """Offsets and logits of one image in which these default boxes have a class with a logit of so much."""
    count = len(built.network.anchors)
    offsets, logits = torch.zeros(1, count, 4), torch.zeros(1, count, 4)
    logits[..., 0] = 12
    for anchor, label, value in found:
        logits[0, anchor, label + 1] = 12 + value
    return offsets, logits


def test_detections_are_ranked_and_the_worse_of_two_boxes_of_a_class_goes() -> None:
    built = model("model.suppression=0.4", "model.network.ratios=[2.0]")
    first, second = built.network.anchors[[100, 101]]
    assert 0.4 < float(box_iou(first[None], second[None])) < 0.9
    boxes, scores, labels, counts = built.detect(
        *outputs_for(built, (100, 1, 2.0), (101, 1, 4.0), (101, 2, 1.0), (0, 0, 0.5))
    )
    assert counts.tolist() == [3]
    assert labels[0, :4].tolist() == [1, 0, 2, -1]
    torch.testing.assert_close(boxes[0, 0], second.clamp(0, 64))
    assert (scores[0, :3].diff() < 0).all()
    assert not scores[0, 3:].any() and not boxes[0, 3:].any()


def test_an_image_without_objects_has_no_detection() -> None:
    built = model()
    boxes, scores, labels, counts = built.detect(*outputs_for(built))
    assert counts.tolist() == [0]
    assert not boxes.any() and not scores.any() and (labels == -1).all()


@pytest.mark.slow
def test_the_exported_graph_finds_what_pytorch_finds_in_batches_of_any_size(tmp_path: Path) -> None:
    built = model("model.score=0.2").eval()
    inputs = kinds.load("boxes").inputs
    images = torch.randint(256, (9, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    onnx_export.write(built, inputs, TASK.outputs, [(images,)], path)
    assert onnx_export.largest_difference(built, inputs, [(images,)], path, 1e-4, TASK.difference) < 1e-4
    exported = onnx_export.session(path)
    for count in (1, 2, 9):
        boxes, scores, labels, counts = exported.run(None, {"image": images[:count].numpy()})
        assert boxes.shape == (count, 20, 4) and boxes.dtype == np.float32
        assert scores.shape == labels.shape == (count, 20)
        assert counts.shape == (count,) and labels.dtype == np.int64
        assert counts.max() > 0


def test_the_default_boxes_are_those_that_torchvision_computes_for_an_image() -> None:
    network = TorchvisionSSD((3, 320, 320), 2, architecture="ssdlite320_mobilenet_v3_large")
    whole = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    image = torch.zeros(1, 3, 320, 320)
    with torch.inference_mode():
        features = list(whole.backbone(image).values())
    (anchors,) = whole.anchor_generator(ImageList(image, [(320, 320)]), features)
    torch.testing.assert_close(network.anchors, anchors)


# --- pretrained weights -----------------------------------------------------------------------------------------------

LITE = "model.backbone={name: efficientnet_lite0, weights: package}"


def pretrained(folder: Path, *overrides: str) -> SSD:
    """A detector on EfficientNet-Lite0, whose folder of weights is made."""
    config = compose(["experiment=coco_ssd", "output=out", "model.network.width=8", LITE, *overrides])
    assert config.pretrained is not None
    obtain_pretrained(config.pretrained, "timm", folder)
    built: SSD = config.model({**META, "architecture": json.loads((folder / "config.json").read_text())})
    return built


def test_a_pretrained_backbone_has_its_weights_and_scales_pixels_as_it_was_trained(tmp_path: Path) -> None:
    built = pretrained(tmp_path)
    backbone: Any = built.network
    before = backbone.backbone.conv_stem.weight.clone()
    built.load_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(before, weights["conv_stem.weight"])
    loaded = backbone.backbone.state_dict()
    shared = loaded.keys() & weights.keys()
    assert len(shared) > 250 and len(shared) == len(loaded)
    assert all(torch.equal(loaded[name], weights[name]) for name in shared)
    torch.testing.assert_close(built.mean.flatten(), torch.full((3,), 127.0))
    torch.testing.assert_close(built.std.flatten(), torch.full((3,), 128.0))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    built = pretrained(tmp_path)
    save_file({"conv_stem.weight": torch.zeros(1, 3, 3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(Failure, match="has not the weights of efficientnet_lite0"):
        built.load_pretrained(tmp_path)


def test_torchvision_s_networks_take_no_other_backbone() -> None:
    config = compose(["experiment=coco_ssd", "model=ssdlite", "data.size=[320,320]", "output=out", f"+{LITE}"])
    with pytest.raises(Failure, match="TorchvisionSSD has a backbone of its own"):
        config.model({**META, "shape": [3, 320, 320], "architecture": {}})
