"""SSD (Liu et al., 2016): each position of several feature maps scores default boxes and moves them onto objects."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDHead
from torchvision.ops import nms

from src.common.errors import Failure
from src.configuration.schema import (
    Build,
    Fraction,
    NonNegativeInt,
    Optimizer,
    Positive,
    PositiveInt,
    Pretrained,
    Probability,
    Schedule,
    Width,
)
from src.models.base import Model, Split

# The offsets of centres and sides are divided by these, for about unit variance: those of the authors' code.
CENTRE, SIDE = 0.1, 0.2
BACKGROUND, IGNORED = -1, -2  # in place of the index of a box that a default box is matched to


# --- boxes ------------------------------------------------------------------------------------------------------------


def default_boxes(
    grids: Sequence[tuple[int, int]], shape: tuple[int, int], scales: tuple[float, float], ratios: Sequence[float]
) -> Tensor:
    """Default boxes of all positions of all grids, fp32 [A, 4] xyxy in pixels, in the order of the heads' outputs.

    The scale rises by equal steps from the first level to the last one (equation 4 of the paper), in sides of the
    image's shorter side. A position has a square of its level's scale, one of the geometric mean with the next scale,
    and for each ratio r two boxes of the same area, r times as wide as high and r times as high as wide.
    """
    height, width = shape
    smallest, largest = scales
    step = (largest - smallest) / max(1, len(grids) - 1)
    parts = []
    for level, (down, across) in enumerate(grids):
        side, following = ((smallest + step * number) * min(shape) for number in (level, level + 1))
        sides = [(side, side), (math.sqrt(side * following),) * 2]
        for ratio in ratios:
            sides += [(side * math.sqrt(ratio), side / math.sqrt(ratio))]
            sides += [(side / math.sqrt(ratio), side * math.sqrt(ratio))]
        halves = torch.tensor(sides) / 2
        y = (torch.arange(down) + 0.5) * (height / down)
        x = (torch.arange(across) + 0.5) * (width / across)
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).view(-1, 1, 2)
        parts.append(torch.cat([centres - halves, centres + halves], -1).view(-1, 4))
    return torch.cat(parts)


def _as_centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sides, [..., 2] each, of xyxy boxes [..., 4]."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Where boxes lie relative to default boxes: xyxy [..., 4] both -> offsets [..., 4]. Sides must be above 0."""
    centres, sides = _as_centres(boxes)
    anchor_centres, anchor_sides = _as_centres(anchors)
    return torch.cat([(centres - anchor_centres) / anchor_sides / CENTRE, (sides / anchor_sides).log() / SIDE], -1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode`; a side grows at most a thousandfold."""
    anchor_centres, anchor_sides = _as_centres(anchors)
    centres = anchor_centres + CENTRE * offsets[..., :2] * anchor_sides
    halves = anchor_sides * (SIDE * offsets[..., 2:]).clamp(max=math.log(1000)).exp() / 2
    return torch.cat([centres - halves, centres + halves], -1)


def overlaps(boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, M, 4] against default boxes [A, 4]: intersection over union, and over the default box; [B, M, A]."""
    corner = torch.maximum(boxes[:, :, None, :2], anchors[:, :2])
    opposite = torch.minimum(boxes[:, :, None, 2:], anchors[:, 2:])
    shared = (opposite - corner).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[..., None]
    anchor_area = (anchors[:, 2:] - anchors[:, :2]).prod(-1)
    return shared / (area + anchor_area - shared).clamp(min=1e-6), shared / anchor_area


def match(boxes: Tensor, labels: Tensor, ignored: Tensor, anchors: Tensor, threshold: float) -> Tensor:
    """What each default box is to find, for a whole batch at once (section 2.2 of the paper).

    A default box is matched to the box that it overlaps most, from the threshold on. Whatever the threshold, each box
    has the default box that overlaps it most; of two boxes with the same one, the one that it overlaps more.

    Args:
        boxes: fp32 [B, M, 4], xyxy.
        labels: int64 [B, M], -1 where there is no box.
        ignored: bool [B, M]: nothing is learnt where more than half of a default box lies in such a box.
        anchors: fp32 [A, 4].

    Returns:
        int64 [B, A]: the index of the box in 0..M-1, BACKGROUND or IGNORED.
    """
    iou, covered = overlaps(boxes, anchors)
    is_object = ((labels >= 0) & ~ignored)[..., None]
    iou = iou.masked_fill(~is_object, -1)
    best = iou.argmax(-1, keepdim=True) == torch.arange(len(anchors), device=iou.device)
    best &= is_object & (iou > 0)
    overlap, index = (iou + 2 * best).max(1)
    in_crowd = (covered.masked_fill(~ignored[..., None], 0) > 0.5).any(1)
    background = torch.where(in_crowd, IGNORED, BACKGROUND)
    return torch.where(overlap >= threshold, index, background)


def hardest(loss: Tensor, positive: Tensor, negative: Tensor, ratio: float) -> Tensor:
    """The negatives of each image with the largest loss, `ratio` times as many as positives: bool [B, A].

    An image without a positive gives as many as one with a single one. Where losses are equal at the end of the
    ranking, all of them count.
    """
    counts = (positive.sum(1).clamp(min=1) * ratio).long().clamp(max=loss.shape[1])
    ranked = loss.detach().masked_fill(~negative, -1).sort(1, descending=True).values
    last = ranked.gather(1, counts[:, None] - 1)
    return negative & (loss >= last)


# --- networks ---------------------------------------------------------------------------------------------------------


class Network(Protocol):
    """What `SSD` trains: normalised images fp32 [B, 3, H, W] -> offsets [B, A, 4], logits [B, A, 1 + classes].

    `anchors`: fp32 [A, 4], the default boxes. The first class is the background.
    """

    anchors: Tensor

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


class TorchvisionSSD(nn.Module):
    """torchvision's SSD, with its own default boxes and heads: VGG-16 at 300x300, or SSDLite on MobileNetV3 at 320x320.

    Raises:
        Failure: the images have another size.
    """

    SIZES: ClassVar = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        architecture: Literal["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"] = "ssd300_vgg16",
    ) -> None:
        super().__init__()
        size = self.SIZES[architecture]
        if list(shape[1:]) != [size, size]:
            raise Failure(
                f"model.network.architecture: {architecture} takes images of {size}x{size}, not "
                f"{shape[1]}x{shape[2]}: set data.size=[{size},{size}]"
            )
        build: Callable[..., Any] = getattr(detection, architecture)
        whole = build(weights=None, weights_backbone=None, num_classes=classes + 1)
        self.backbone, self.head = whole.backbone, whole.head
        with torch.inference_mode():
            image = torch.zeros(1, *shape)
            features = list(self.backbone.eval()(image).values())
            (anchors,) = whole.anchor_generator(ImageList(image, [(size, size)]), features)
        self.backbone.train()
        self.register_buffer("anchors", anchors.clone(), persistent=False)
        self.anchors: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.head(list(self.backbone(images).values()))
        return outputs["bbox_regression"], outputs["cls_logits"]


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class TimmSSD(nn.Module):
    """SSD on the feature maps of any network of timm, which are brought to `width` channels.

    `strides` are those of the network's maps that objects are found on; `extra_levels` more follow, each half as large
    as the one before. With `top_down` each map has the next coarser one added (Lin et al., 2017), so that the fine ones
    know what is around an object.

    Raises:
        Failure: timm has no such network, or it has no such stride.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        backbone: str,
        strides: list[PositiveInt] = [8, 16, 32],  # noqa: B006  # read only
        extra_levels: NonNegativeInt = 2,
        width: Width = 128,
        top_down: bool = False,
        smallest: Positive = 0.1,
        largest: Positive = 0.9,
        ratios: list[Positive] = [2.0],  # noqa: B006  # read only
    ) -> None:
        super().__init__()
        import timm

        self.backbone: Any
        try:
            self.backbone = timm.create_model(backbone, pretrained=False, features_only=True)
            available = self.backbone.feature_info.reduction()
            if missing := sorted(set(strides) - set(available)):
                raise Failure(
                    f"model.network.strides: {backbone} has no map of stride {missing[0]}; it has "
                    f"{', '.join(map(str, available))}"
                )
            self.name, self.indices = backbone, [available.index(stride) for stride in sorted(strides)]
            self.backbone = self._pyramid()
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise Failure(f"model.network.backbone: timm can't build {backbone!r} as a pyramid ({error})") from None
        self.top_down = top_down
        self.lateral = nn.ModuleList(_convolution(c, width, 1) for c in self.backbone.feature_info.channels())
        self.smooth = (
            nn.ModuleList(_convolution(width, width, 3) for _ in self.indices) if top_down else nn.ModuleList()
        )
        self.extra = nn.ModuleList(_convolution(width, width, 3, stride=2) for _ in range(extra_levels))
        levels = len(self.indices) + extra_levels
        self.head = SSDHead([width] * levels, [2 + 2 * len(ratios)] * levels, classes + 1)
        with torch.inference_mode():
            self.eval()
            grids = [(int(f.shape[2]), int(f.shape[3])) for f in self.features(torch.zeros(1, *shape))]
            self.train()
        anchors = default_boxes(grids, (shape[1], shape[2]), (smallest, largest), ratios)
        self.register_buffer("anchors", anchors, persistent=False)
        self.anchors: Tensor

    def _pyramid(self, **options: Any) -> Any:
        import timm

        return timm.create_model(self.name, features_only=True, out_indices=self.indices, **options)

    def load_backbone(self, path: Path) -> None:
        """Takes over the weights of the network of timm's, a safetensors file of the complete classifier.

        Raises:
            Failure: they are of another network.
        """
        logging.getLogger("timm").setLevel(logging.ERROR)  # it notes that the head is not needed
        try:
            with torch.random.fork_rng(devices=[]):
                loaded = self._pyramid(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        except RuntimeError as error:
            raise Failure(f"{path} has not the weights of {self.name} ({' '.join(str(error).split())[:300]})") from None
        self.backbone.load_state_dict(loaded.state_dict())

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps that objects are found on, from fine to coarse: [B, width, H / stride, W / stride]."""
        maps = [lateral(part) for lateral, part in zip(self.lateral, self.backbone(images), strict=True)]
        if self.top_down:
            for level in reversed(range(len(maps) - 1)):
                size = maps[level].shape[-2:]
                maps[level] = maps[level] + F.interpolate(maps[level + 1], size=size, mode="nearest")
            maps = [smooth(part) for smooth, part in zip(self.smooth, maps, strict=True)]
        for extra in self.extra:
            maps.append(extra(maps[-1]))
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.head(self.features(images))
        return outputs["bbox_regression"], outputs["cls_logits"]


# --- suppression ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pipeline::not_suppressed", mutates_args=())
def not_suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Which boxes of each image stay when those that overlap a better one by more than the threshold go.

    boxes: fp32 [B, K, 4] xyxy; scores: fp32 [B, K]; bool [B, K]. An operator of its own, since in ONNX it is one that
    takes a whole batch.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, image_boxes, image_scores in zip(kept, boxes, scores, strict=True):
        row[nms(image_boxes, image_scores, threshold)] = True
    return kept


@not_suppressed.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _onnx_operators() -> dict[Any, Callable[..., Any]]:
    from onnxscript import FLOAT, opset18

    op: Any = opset18  # whose types leave out constants

    def suppression(boxes: FLOAT, scores: FLOAT, threshold: float) -> Any:
        ranked = op.Unsqueeze(scores, op.Constant(value_ints=[1]))
        count = op.Squeeze(op.Shape(scores, start=1, end=2), op.Constant(value_ints=[0]))
        chosen = op.NonMaxSuppression(boxes, ranked, count, op.Constant(value_float=threshold))  # [n, 3]
        places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # image, box
        kept = op.ScatterND(
            op.Expand(op.Constant(value_float=0.0), op.Shape(scores)),
            places,
            op.Expand(op.Constant(value_float=1.0), op.Shape(places, start=0, end=1)),
        )
        return op.Greater(kept, op.Constant(value_float=0.5))

    return {torch.ops.pipeline.not_suppressed.default: suppression}


# --- the model --------------------------------------------------------------------------------------------------------


class SSD(Model):
    """Trains a detector.

    The loss is smooth L1 on the offsets of matched default boxes, and cross-entropy on those and the hardest others;
    both are divided by the batch's number of matched default boxes.

    Args:
        backbone: the pretrained network of timm's that stands in place of `network.backbone`; its own mean and
            deviation scale the pixels. None: the network is drawn at random.
        matching: overlap from which a default box is to find a box.
        negatives: default boxes without an object that count in the loss, for one with an object.
        candidates: the best of all boxes and classes of an image, among which suppression takes place.
        detections: boxes in an answer, at most.
        suppression: overlap above which the worse of two boxes of a class goes.
        score: smallest score of a detection.
    """

    task = "detection"
    library = "timm"

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        network: Build,
        backbone: Pretrained | None = None,
        optimizer: Optimizer,
        schedule: Schedule,
        matching: Fraction = 0.5,
        negatives: Positive = 3.0,
        candidates: PositiveInt = 400,
        detections: PositiveInt = 200,
        suppression: Fraction = 0.45,
        score: Probability = 0.01,
    ) -> None:
        losses = ("loss", "class_loss", "box_loss")
        super().__init__(optimizer=optimizer, schedule=schedule, train=losses, val=losses)
        self.matching = matching
        self.negatives = negatives
        self.candidates = candidates
        self.detections = detections
        self.suppression = suppression
        self.score = score
        self.shape = (meta["shape"][1], meta["shape"][2])
        scaling = meta
        if backbone is not None:
            if "backbone" not in type(network).model_fields:
                raise Failure(f"model.backbone: {network.target} has a backbone of its own; leave it null")
            network = network.model_copy(update={"backbone": backbone.name})
            scaling = self.architecture = meta["architecture"]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(scaling[key]).mul(255).view(1, 3, 1, 1))
        self.mean: Tensor
        self.std: Tensor
        self.network: Network = network(shape=meta["shape"], classes=len(meta["classes"]))
        self.precision = MeanAveragePrecision(backend="pycocotools")
        self.precision.warn_on_many_detections = False

    def load_pretrained(self, folder: Path) -> None:
        assert isinstance(self.network, TimmSSD)
        self.network.load_backbone(folder / "model.safetensors")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> offsets fp32 [B, A, 4], logits fp32 [B, A, 1 + classes]."""
        normalised = (images.to(self.mean.dtype) - self.mean) / self.std
        offsets, logits = self.network(normalised)
        return offsets.float(), logits.float()

    def answer(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detections, the best first.

        Returns:
            boxes fp32 [B, D, 4] xyxy in pixels of the image, scores fp32 [B, D], labels int64 [B, D], counts int64 [B]:
            the first `counts` rows of an image are detections; the others have zeros and the label -1.
        """
        return self.detect(*self(images))

    def detect(self, offsets: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        """The detections in the network's outputs, as `answer` gives them."""
        classes = logits.shape[-1] - 1
        scores = logits.softmax(-1)[..., 1:].flatten(1)  # [B, A * classes]
        scores, chosen = scores.topk(min(self.candidates, scores.shape[1]), 1)
        anchors, labels = chosen // classes, chosen % classes
        height, width = self.shape
        x1, y1, x2, y2 = decode(offsets, self.network.anchors).unbind(-1)
        boxes = torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], -1)
        boxes = boxes.gather(1, anchors[..., None].expand(-1, -1, 4))
        apart = labels[..., None].to(boxes.dtype) * (max(self.shape) + 1)  # boxes of two classes never overlap
        kept = torch.ops.pipeline.not_suppressed(boxes + apart, scores, self.suppression)
        scores = torch.where(kept & (scores >= self.score), scores, 0)
        scores, best = scores.topk(min(self.detections, scores.shape[1]), 1)
        is_there = scores > 0
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4)) * is_there[..., None]
        labels = torch.where(is_there, labels.gather(1, best), -1)
        return boxes, scores, labels, is_there.sum(1)

    @staticmethod
    def onnx_operators() -> dict[Any, Callable[..., Any]]:
        return _onnx_operators()

    def step_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        images, *targets = batch
        return self.loss(self(images), tuple(targets), "train")

    def loss(self, outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, ...], split: Split) -> Tensor:
        """The loss of a batch, a scalar; adds to the epoch's means.

        `targets`: boxes fp32 [B, M, 4], labels int64 [B, M] and ignored bool [B, M], as `match` takes them.
        """
        offsets, logits = outputs
        boxes, labels, ignored = targets
        anchors = self.network.anchors
        with torch.no_grad():
            matched = match(boxes, labels, ignored, anchors, self.matching)
            positive, negative = matched >= 0, matched == BACKGROUND
            index = matched.clamp(min=0)
            classes = torch.where(positive, labels.gather(1, index) + 1, 0)
            aims = boxes.gather(1, index[..., None].expand(-1, -1, 4))
            aims = torch.where(positive[..., None], aims, anchors)
            aims = encode(aims, anchors)
        entropy = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(matched)
        counted = positive | hardest(entropy, positive, negative, self.negatives)
        number = positive.sum().clamp(min=1)
        class_loss = (entropy * counted).sum() / number
        distance = F.smooth_l1_loss(offsets, aims, reduction="none").sum(-1)
        box_loss = (distance * positive).sum() / number
        loss = class_loss + box_loss
        count = len(labels)
        self.add(split, count, loss=loss * count, class_loss=class_loss * count, box_loss=box_loss * count)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images, *targets = batch
        outputs = self(images)
        self.loss(outputs, tuple(targets), "val")
        self.precision.update(*as_pairs(self.detect(*outputs), targets))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        figures = self.precision.compute()
        self.precision.reset()
        self.log_dict({"val_map": figures["map"].clamp(min=0), "val_ap50": figures["map_50"].clamp(min=0)})


def as_pairs(
    answer: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Detections and true boxes of a batch, image by image, as torchmetrics takes them."""
    detections = [
        {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count]}
        for boxes, scores, labels, count in zip(*answer[:3], answer[3].tolist(), strict=True)
    ]
    truths = []
    for boxes, labels, ignored in zip(*targets, strict=True):
        is_box = labels >= 0
        truths.append({"boxes": boxes[is_box], "labels": labels[is_box], "iscrowd": ignored[is_box].int()})
    return detections, truths
