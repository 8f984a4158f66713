"""What several networks are built of."""

from __future__ import annotations

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
}


def activated(name: str) -> nn.Module:
    """The activation of that name; a leaky ReLU lets a fifth of what is negative pass, as in DCGAN."""
    return nn.LeakyReLU(0.2) if name == "leaky_relu" else ACTIVATIONS[name]()
