"""Tasks: a file each, holding all that differs between classification, translation, reconstruction and generation.

`src/tasks/NAME.py` has a constant `TASK`. Importing it must not import torch, Lightning, torchmetrics or matplotlib:
composition asks it for its metrics and options, `src.predict` for its feeds and answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from src.common.errors import Failure
from src.configuration.declarations import load_task, task_of
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation
from src.data import kinds
from src.data.kinds import Feed, Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.data.batching import Batches, BatchSource

__all__ = ["Answer", "Evaluated", "Metric", "Request", "Task", "load", "of"]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation measured: figures by name, and, if it has them, `actual` and `predicted` of each example.

    `options` stand beside the figures in metrics.json: those without which they would be others.
    """

    metrics: dict[str, float]
    pairs: Sequence[Mapping[str, str]] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a caller of an exported model asks for."""

    source: str | None = None  # a path or a text; None: the model draws from nothing
    top: int = 5  # classes in an answer
    count: int = 16  # pictures drawn from nothing
    seed: int = 0  # of what they are drawn from
    to: str | None = None  # the domain that an image is translated into, where a model has several


@dataclass(frozen=True)
class Answer:
    """An answer as a caller reads it: lines, a picture, or both."""

    lines: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] | None = None  # what the lines say, for CSV and JSON; None: the lines
    picture: np.ndarray | None = None  # uint8 [H, W] or [H, W, 3]
    file: Path = field(default=Path("answer.png"))  # where the picture goes unless the caller says otherwise
    written: Path | None = None  # where it went


class Task(Protocol):
    """A task. Methods with a body here are optional; torch may be imported within those above `numpy and PIL alone`."""

    takes: tuple[str, ...]  # kinds of data, by name
    metrics: Mapping[str, Metric]  # of all splits, by the name that follows train_, val_ or test_
    options: type[Evaluation]  # the keys that `evaluation` takes
    outputs: tuple[str, ...] = ("output",)  # of the exported graph

    def evaluate(
        self, model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
    ) -> Evaluated:
        """Measures a trained model on the test split; pictures go into `folder`."""

    def inputs(self, kind: str) -> Inputs:
        """The exported graph's inputs: those of the kind of data, unless the task has its own."""
        return kinds.load(kind).inputs

    def batches(self, model: nn.Module, batches: Batches) -> BatchSource:
        """Batches that begin with the exported graph's inputs: those of a split, unless the task has its own."""
        return batches

    # By which the cost of int8 is told: figures, summed over a batch's examples, of the graph's outputs for the batch,
    # whose labels or targets stand last.
    int8_figures: Mapping[str, Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float]] = MappingProxyType({})

    def difference(
        self, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], model: Any, tolerance: float
    ) -> float:
        """How far the exported graph's outputs for a batch differ from PyTorch's, which have the same shapes.

        The largest absolute difference, unless the task knows better: an order of outputs whose ranks are equal is no
        difference. `tolerance`: what is allowed.
        """
        from src.exporting.differences import absolute_difference

        return absolute_difference(expected, actual, model, tolerance)

    def showcase(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """What the model makes of a validation batch, shown during training: images uint8 [K, C, H, W] by title."""
        return {}

    def remark(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """A sentence for the run's summary, from its epochs' metrics, if something in them must not be missed."""
        return None

    # --- numpy and PIL alone: what a caller of the exported model needs ---

    def signature(self, model: nn.Module, meta: Mapping[str, Any], config: Config) -> dict[str, Any]:
        """What `encode` and `decode` need beside the graph, as JSON."""
        return kinds.load(meta["kind"]).signature(meta, config.loader)

    def encode(self, request: Request, signature: Mapping[str, Any]) -> Feed:
        """A request as the graph's inputs.

        Raises:
            Failure: there is no input, or it can't be read.
        """
        return kinds.load(signature["kind"]).read(request.source, signature)

    def outputs_for(self, request: Request) -> Sequence[str]:
        """The outputs that a request needs, by name; the graph computes no others.

        Raises:
            Failure: the request asks for what the model can't give.
        """
        if request.to is not None:
            raise Failure(f"--to {request.to}: this model has one kind of answer; leave --to out")
        return self.outputs

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        """The graph's outputs, in the order of `outputs_for`, as an answer."""

    # --- the model card ---

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        """The hub's name for the task, its `pipeline_tag`."""

    def example_arguments(self, signature: Mapping[str, Any]) -> str:
        """What stands after `python -m src.predict FOLDER` in an example."""
        return kinds.load(signature["kind"]).example_argument

    def snippet(self, signature: Mapping[str, Any]) -> str:
        """Python that calls the graph with ONNX Runtime alone: `session`, `np` and `onnxruntime` are there already."""


def load(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is no such file in src/tasks/.
    """
    task: Task = load_task(name)
    return task


def of(config: Config) -> tuple[str, Task]:
    """The task of the configured model, with its name."""
    name = task_of({"_target_": config.model.target})
    return name, load(name)
