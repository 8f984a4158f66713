"""Training steps as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]
Losses = dict[str, Tensor]
Step = Callable[[Batch], Losses]
# Optimizers whose updates can be captured: their state and their rates lie on the device.
CAPTURABLE = (torch.optim.SGD, torch.optim.Adam)


@dataclass(frozen=True)
class StepGraph:
    """A step as a graph: `replay` takes it on what `batch` holds, and `losses` are those of the last replay."""

    replay: Callable[[], object]
    batch: Batch
    losses: Losses


class StepGraphs:
    """Takes training steps by CUDA graphs, one for each shape of batch.

    A step of many small kernels takes as long as the host needs to launch them; a graph is launched at once. It holds
    forward pass, loss, backward pass and the optimizers' updates, on a batch that is copied in: the same kernels in the
    same order as without it, so the bits are the same. The first step is taken without: it makes the optimizers' state.

    `capture` captures a step on a batch; tests, which have no GPU, give another one.
    """

    def __init__(self, capture: Callable[[Step, Batch], StepGraph] | None = None) -> None:
        self.capture = capture or capture_on_gpu
        self.graphs: dict[Hashable, StepGraph] = {}
        self.has_begun = False

    def take(
        self, step: Step, batch: Batch, optimizers: Sequence[torch.optim.Optimizer], variant: Hashable = None
    ) -> Losses:
        """Takes `step`, which uses the optimizers, on the batch; returns what it returns.

        `variant` says which of several steps it is. The optimizers' learning rates become tensors on the device.
        """
        if not all(isinstance(optimizer, CAPTURABLE) for optimizer in optimizers):
            return step(batch)
        if not self.has_begun:
            self.has_begun = True
            _prepare(optimizers, batch[0].device)
            return step(batch)
        key = (variant, *((tensor.shape, tensor.dtype) for tensor in batch))
        if key not in self.graphs:
            self.graphs[key] = self.capture(step, tuple(tensor.clone() for tensor in batch))
        graph = self.graphs[key]
        for input_, tensor in zip(graph.batch, batch, strict=True):
            input_.copy_(tensor)
        graph.replay()
        return graph.losses


def _prepare(optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
    """Has the optimizers read their rates on the device; a checkpoint brings them back on the CPU."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
            group["fused"] = True  # these kernels read the rate on the device
            if "capturable" in group:
                group["capturable"] = True


def capture_on_gpu(step: Step, batch: Batch) -> StepGraph:
    """Captures a step as a CUDA graph; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: another one may be reading rows into page-locked memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        losses = step(batch)
    return StepGraph(graph.replay, batch, {name: loss.detach() for name, loss in losses.items()})
