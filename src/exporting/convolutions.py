"""Convolutions in the form in which an exported graph runs them fastest."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class SubPixel(nn.Module):
    """A transposed convolution that doubles the size (kernel 4, stride 2, padding 1), as a convolution.

    Each of the four pixels that come from one place has a kernel of 2x2 of its own; they are laid out and the edge
    is cut off (Shi et al., 2016). ONNX Runtime runs convolutions faster than transposed ones, and in int8.
    """

    def __init__(self, doubling: nn.ConvTranspose2d) -> None:
        super().__init__()
        kernels = doubling.weight.detach().unflatten(3, (2, 2)).unflatten(2, (2, 2))  # [in, out, 2, row, 2, column]
        self.weight = kernels.flip(2, 4).permute(1, 3, 5, 0, 2, 4).flatten(0, 2)  # [4 * out, in, 2, 2]
        self.bias = None if doubling.bias is None else doubling.bias.detach().repeat_interleave(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, padding=1), 2)[:, :, 1:-1, 1:-1]


def without_transposed(model: AnyModule) -> AnyModule:
    """The model, or a copy of it with convolutions where it has transposed ones that double the size."""
    layers = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.ConvTranspose2d) and _doubles_the_size(part)
    }
    if layers:
        model = copy.deepcopy(model)
        for name, part in layers.items():
            model.set_submodule(name, SubPixel(part))
    return model


def _doubles_the_size(layer: nn.ConvTranspose2d) -> bool:
    plain = (layer.output_padding, layer.dilation, layer.groups) == ((0, 0), (1, 1), 1)
    return plain and (layer.kernel_size, layer.stride, layer.padding) == ((4, 4), (2, 2), (1, 1))
