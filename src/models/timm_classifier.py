"""Image classifiers with a network of timm's, from pretrained weights or from random ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import Failure
from src.configuration.schema import (
    LabelSmoothing,
    LayerDecay,
    NonNegativeInt,
    Optimizer,
    Positive,
    PositiveInt,
    Pretrained,
    Probability,
    Schedule,
)
from src.models.classifier import Classifier

SMALL = 64  # pixels a side below which the first convolution keeps the size, as ResNets for CIFAR do


class TimmClassifier(Classifier):
    """Classifies images with any network of timm's, whose head is made anew for the data's classes.

    Above pretrained weights the head begins at zero, as in Kolesnikov et al., 2020 (arXiv 1912.11370).

    Pixels are scaled, and brought to the size, as the network's own configuration says (`meta["architecture"]`: mean
    and std in 0..1, input_size [C, H, W]).

    Raises:
        Failure: the network does not take an option.
    """

    library = "timm"
    takes = ("images",)

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        network: Pretrained,
        optimizer: Optimizer,
        schedule: Schedule,
        size: PositiveInt | Literal["own", "data"] = "own",
        freeze: NonNegativeInt | Literal["backbone"] = 0,
        layer_decay: LayerDecay = 1.0,
        head_rate: Positive = 1.0,
        drop_path: Probability = 0.0,
        dropout: Probability = 0.0,
        label_smoothing: LabelSmoothing = 0.0,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, label_smoothing=label_smoothing)
        architecture: Mapping[str, Any] = meta["architecture"]
        self.architecture = architecture
        channels = meta["shape"][0]
        self.own_size = architecture["input_size"][-1]
        self.size = meta["shape"][-1] if size == "data" else self.own_size if size == "own" else size
        self.name = network.name
        self.options: dict[str, Any] = {"in_chans": channels, "num_classes": len(meta["classes"])}
        for key, value in {"drop_path_rate": drop_path, "drop_rate": dropout}.items():
            if value:
                self.options[key] = value
        for key in ("mean", "std"):
            values = torch.tensor(architecture[key]).mul(255)
            values = values if len(values) == channels else values.mean().expand(channels)
            self.register_buffer(key, values.reshape(1, channels, 1, 1).clone())
        self.mean: Tensor
        self.std: Tensor
        self.network: Any = self._create()
        self.layers = _layers(self.network)
        self.head = max(self.layers.values())
        self.frozen = self.head if freeze == "backbone" else freeze
        if self.frozen > self.head:
            raise Failure(f"model.freeze: {freeze}, but {self.name} has {self.head} stages before its head; give fewer")
        self.layer_decay = layer_decay
        self.head_rate = head_rate
        for parameter_name, parameter in self.network.named_parameters():
            parameter.requires_grad_(self.layers[parameter_name] >= self.frozen)

    def _create(self, **options: Any) -> nn.Module:
        import timm

        config = timm.get_pretrained_cfg(self.name)
        if config is not None and config.fixed_input_size and self.size != self.own_size:
            options["img_size"] = self.size
        try:
            network: nn.Module = timm.create_model(self.name, **self.options, **options)
        except (TypeError, AssertionError, RuntimeError) as error:
            raise Failure(f"model.network.name: {self.name} can't be built ({' '.join(str(error).split())})") from error
        if self.size < SMALL:
            _keep_size_in_stem(network)
        return network

    def load_pretrained(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        logging.getLogger("timm").setLevel(logging.ERROR)  # a new head is what is wanted
        with torch.random.fork_rng(devices=[]):
            loaded = self._create(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        self.network.load_state_dict(
            {name: value for name, value in loaded.state_dict().items() if self.layers.get(name) != self.head},
            strict=False,
        )
        # A new head of two classes has, by timm's rule, weights so large that its first gradients spoil the others.
        for name, parameter in self.network.named_parameters():
            if self.layers[name] == self.head:
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> logits [B, classes]."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        if x.shape[-2:] != (self.size, self.size):
            shrinks = min(x.shape[-2:]) > self.size
            mode = "bilinear" if shrinks else "bicubic"
            x = F.interpolate(x, (self.size, self.size), mode=mode, antialias=shrinks)
        logits: Tensor = self.network(x)
        return logits

    def train(self, mode: bool = True) -> TimmClassifier:
        """Sets the mode; normalisations in frozen stages keep their statistics."""
        super().train(mode)
        for prefix, module in self.network.named_modules():
            names = [name for name, _ in module.named_parameters(prefix, recurse=False)]
            if names and all(self.layers[name] < self.frozen for name in names):
                module.eval()
        return self

    def rate_factors(self) -> Mapping[nn.Parameter, float]:
        if self.layer_decay == self.head_rate == 1:
            return {}
        return {
            parameter: self.head_rate
            if self.layers[name] == self.head
            else self.layer_decay ** (self.head - self.layers[name])
            for name, parameter in self.network.named_parameters()
        }


def _layers(network: Any) -> dict[str, int]:
    """The stage of each parameter: 0 for the stem, the largest for the head."""
    from timm.models import group_parameters

    groups: Mapping[int, list[str]] = group_parameters(network, network.group_matcher(coarse=True))
    layers = {name: layer for layer, names in groups.items() for name in names}
    head = max(layers.values())
    names = {parameter: name for name, parameter in network.named_parameters()}
    classifier = {names[parameter] for parameter in network.get_classifier().parameters()}
    # A norm may stand in the classifier's group: its pretrained weights count.
    return {name: head if name in classifier else min(layer, head - 1) for name, layer in layers.items()}


def _keep_size_in_stem(network: nn.Module) -> None:
    """Lets the first convolution keep the size of small images, and drops a pooling; pretrained weights still fit."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    if first.kernel_size != first.stride:  # patches of a transformer stay
        first.stride = (1, 1)
    if isinstance(getattr(network, "maxpool", None), nn.MaxPool2d):
        network.maxpool = nn.Identity()
