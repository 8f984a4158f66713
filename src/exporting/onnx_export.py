"""Models as ONNX graphs with dynamic batch (and length), checked on real inputs against the original and timed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.common.errors import Failure
from src.common.files import write_atomically
from src.configuration.schema import Export
from src.data.batching import BatchSource
from src.data.kinds import Feed, Inputs
from src.exporting.convolutions import without_transposed
from src.exporting.differences import absolute_difference
from src.exporting.latency import median_ms, one_thread
from src.models.base import Model

OPSET = 18
EXAMPLES = 3  # batches by which an exported graph is checked and timed
LARGEST = {"batch": 65_536}  # of a free dimension by its name; others have at most 100,000


class _Answering(nn.Module):
    """A model's `answer` as its forward pass: a tuple of outputs."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model.answer(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def answering(model: Model) -> nn.Module:
    """The model as it is exported: fp32, in evaluation mode, answering what a caller gets (probabilities, not logits).

    Its forward pass returns a tuple, also of one output.
    """
    return _Answering(model.float()).eval()


def example_inputs(inputs: Inputs, batches: BatchSource) -> list[tuple[Tensor, ...]]:
    """The inputs, without labels or targets, of the first batches, up to `EXAMPLES`."""
    return [batch[: len(inputs.names)] for batch in islice(batches, EXAMPLES)]


def write(
    model: Model, inputs: Inputs, outputs: Sequence[str], examples: Sequence[tuple[Tensor, ...]], path: Path
) -> None:
    """Exports to `path`; its bytes depend on the model alone."""
    import onnx

    # Three examples, so that no free dimension has the size one, which the exporter would take for fixed.
    arguments = tuple(value[:3] for value in examples[-1])
    names = {name for sizes in inputs.free for name in sizes.values()}
    dimensions = {name: torch.export.Dim(name, min=1, max=LARGEST.get(name, 100_000)) for name in sorted(names)}
    shapes = tuple({axis: dimensions[name] for axis, name in sizes.items()} for sizes in inputs.free)
    with quiet():
        program = torch.onnx.export(
            answering(without_transposed(model)),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs.names),
            output_names=list(outputs),
            dynamic_shapes=(shapes,),
            custom_translation_table=model.onnx_operators(),
            verbose=False,
            external_data=False,
        )
    exported = program.model_proto  # type: ignore[union-attr]
    # The exporter notes stack traces with this machine's paths: of no use to a caller, and other bits on each machine.
    for part in (exported, exported.graph, *exported.graph.node, *exported.graph.value_info, *exported.graph.input):
        del part.metadata_props[:]
    for node in exported.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(exported)
    write_atomically(path, exported.SerializeToString(deterministic=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the exporters' progress notes and warnings; exceptions pass."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def session(path: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU; `threads=0` leaves the number to it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feed(inputs: Inputs, values: Sequence[Tensor]) -> Feed:
    """The inputs by their names, as a session takes them."""
    return {name: value.numpy() for name, value in zip(inputs.names, values, strict=True)}


# How far a batch's outputs, PyTorch's and the graph's, differ, for a model and a tolerance.
Difference = Callable[[Sequence[np.ndarray], Sequence[np.ndarray], Model, float], float]


def largest_difference(
    model: Model,
    inputs: Inputs,
    examples: Sequence[tuple[Tensor, ...]],
    path: Path,
    tolerance: float,
    difference: Difference = absolute_difference,
) -> float:
    """The largest difference between the exported model's outputs and PyTorch's, over several batch sizes.

    Raises:
        Failure: it is above `tolerance`, or an output has another shape.
    """
    original, exported = answering(model), session(path)
    largest = 0.0
    for size in (1, 2, 7, 32):
        for batch in examples:
            values = inputs.trimmed(*(value[:size] for value in batch))
            with torch.inference_mode():
                expected = [output.numpy() for output in original(*values)]
            outputs = exported.run(None, feed(inputs, values))
            for part, array, output in zip(exported.get_outputs(), expected, outputs, strict=True):
                if output.shape != array.shape:
                    raise Failure(
                        f"{path}: {part.name} has shape {output.shape} where PyTorch gives {array.shape}; not exported"
                    )
            # Unlike max, it keeps a NaN.
            largest = float(np.maximum(largest, difference(expected, outputs, model, tolerance)))
    if not largest <= tolerance:
        raise Failure(
            f"{path}: answers differ from PyTorch's by up to {largest:.2e}, export.tolerance is {tolerance:g}; "
            "not exported"
        )
    return largest


def latency(
    model: Model,
    inputs: Inputs,
    examples: Sequence[tuple[Tensor, ...]],
    graphs: Mapping[str, Path],
    options: Export,
) -> list[dict[str, float]]:
    """Median milliseconds a batch, PyTorch eager and the graphs by their names, one thread each.

    Returns:
        A row per batch size: `batch`, `pytorch_ms`, and of each graph `NAME_ms` and `NAME_speedup` against PyTorch.
    """
    original, sessions = answering(model), [session(path, threads=1) for path in graphs.values()]
    rows = []
    for size in options.latency_batches:
        values = tuple(value[torch.arange(size) % len(value)] for value in examples[len(examples) // 2])
        calls = [partial(exported.run, None, feed(inputs, values)) for exported in sessions]
        with torch.inference_mode(), one_thread():
            eager, *others = median_ms([partial(original, *values), *calls], options.latency_seconds)
        row = {"batch": size, "pytorch_ms": eager}
        for name, milliseconds in zip(graphs, others, strict=True):
            row |= {f"{name}_ms": milliseconds, f"{name}_speedup": eager / milliseconds}
        rows.append(row)
    return rows
