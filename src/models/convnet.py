"""A plain convolutional network: convolutions with pooling, then dense layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from src.common.errors import Failure
from src.configuration.schema import Activation, Dropout, PositiveInt
from src.models.layers import activation_layer


class ConvNet(nn.Module):
    """For each of `widths` a 3x3 convolution, an activation and 2x2 max pooling; then dense layers of `hidden` units.

    Maps float [B, *shape], shape (C, H, W), to logits [B, classes]. `features` computes the inputs of the last layer.
    Dropout comes before every dense layer; `batch_norm` between convolution and activation.

    Raises:
        Failure: the image is too small for so many poolings.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        widths: list[PositiveInt],
        hidden: list[PositiveInt],
        activation: Activation = "relu",
        dropout: Dropout = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        halvings = len(widths)
        if min(height, width) >> halvings == 0:
            raise Failure(
                f"model.network.widths: {halvings} convolutions halve an image of {height}x{width} to nothing; "
                f"give at most {min(height, width).bit_length() - 1}"
            )
        layers: list[nn.Module] = []
        for inputs, outputs in zip([channels, *widths], widths, strict=False):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers += [activation_layer(activation), nn.MaxPool2d(2)]
        flat = (widths[-1] if widths else channels) * (height >> halvings) * (width >> halvings)
        layers += [nn.Flatten()]
        for inputs, outputs in zip([flat, *hidden], hidden, strict=False):
            layers += [nn.Dropout(dropout), nn.Linear(inputs, outputs), activation_layer(activation)]
        self.features = nn.Sequential(*layers, nn.Dropout(dropout))
        self.classify = nn.Linear([flat, *hidden][-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))
