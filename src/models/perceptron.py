"""A feed-forward network (multilayer perceptron)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from src.configuration.schema import Activation, Dropout, PositiveInt
from src.models.layers import activation_layer


class Perceptron(nn.Module):
    """x -> W2 a(W1 x + b1) + b2, with one hidden layer for each width in `hidden`; an empty list is a linear model.

    Maps float [B, *shape] to logits [B, classes]. Dropout follows each activation.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        hidden: list[PositiveInt],
        activation: Activation = "relu",
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        widths = [math.prod(shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(widths, hidden, strict=False):
            layers += [nn.Linear(inputs, outputs), activation_layer(activation), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
