"""Refuses a batch that cannot fit into memory, before it is tried.

A pass of two examples through a copy of the model tells how much an example takes at least. What a library's kernels
take besides is not known, so a batch that passes may still be too large.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import ConfigError
from src.common.hardware import device_of, free_memory
from src.configuration.schema import Config
from src.data.batching import Batches, evaluation_batch
from src.models.base import Model

LARGE = 500 * 3 * 64 * 64  # numbers in a batch, below which no batch is looked at
EXAMPLES = 2  # batch normalisation takes no single one


@dataclass(frozen=True)
class Demand:
    """The bytes that one example takes at least."""

    training: int  # what the forward pass keeps for the backward pass
    evaluation: int  # the inputs and outputs of the layer that has most of both


def refuse_too_large(config: Config, meta: Mapping[str, Any], model: Model, train: Batches) -> None:
    """Refuses batches of images that cannot fit into the memory that is free; looks at large batches only.

    Raises:
        ConfigError: they can't; the message names the key and the largest size.
    """
    sizes = {
        "data.loader.batch_size": train.size // train.world,
        "data.loader.eval_batch_size": (config.loader.eval_batch_size or evaluation_batch(meta)) // train.world,
    }
    if max(sizes.values()) * math.prod(meta.get("shape", (0,))) <= LARGE:
        return
    device = device_of(config.trainer.accelerator)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    example = demand(model, train) if free else None
    if not free or not example:
        return
    for (key, size), each in zip(sizes.items(), (example.training, example.evaluation), strict=True):
        if size * each > free:
            raise ConfigError(
                f"{key}: {size * train.world} images of {'x'.join(map(str, meta['shape'][1:]))} take at least "
                f"{size * each / 2**30:.1f} GiB of memory in each process, and {free / 2**30:.1f} GiB are free; "
                f"give at most {max(1, free // each) * train.world}"
            )


def demand(model: Model, train: Batches) -> Demand | None:
    """What an example takes, by a pass of two through a copy of the model; None if it has no `step_loss`.

    Neither the model nor any random state is changed.
    """
    if type(model).step_loss is Model.step_loss:
        return None
    batch = train.collate(train.order()[0][:EXAMPLES], 0)
    count = min(EXAMPLES, train.count)
    duplicate = copy.deepcopy(model).train()
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*duplicate.parameters(), *duplicate.buffers())}
    kept: dict[int, Tensor] = {}  # by storage; held, or another tensor could get its address
    largest = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        largest = max(largest, sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()))

    for module in duplicate.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(look)
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        duplicate.step_loss(batch)
    return Demand(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // count, largest // count)
