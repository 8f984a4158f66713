"""Models as ONNX graphs with dynamic batch (and length), checked on real inputs against the original and timed."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.common.errors import Failure
from src.configuration.schema import Export
from src.exporting.inference import without_transposed


@dataclass(frozen=True)
class Inputs:
    """A model's inputs: their names, and which of their dimensions are free."""

    names: tuple[str, ...]
    free: tuple[dict[int, str], ...]


IMAGE = Inputs(("image",), ({0: "batch"},))
TEXT = Inputs(("tokens", "lengths"), ({0: "batch", 1: "time"}, {0: "batch"}))
LATENT = Inputs(("latent",), ({0: "batch"},))
INPUTS = {"images": IMAGE, "pairs": IMAGE, "text": TEXT}


class _Answering(nn.Module):
    """A model's `answer` as its forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.answer(*inputs)  # type: ignore[operator]


def answering(model: nn.Module) -> nn.Module:
    """The model as it is exported: fp32, in evaluation mode, giving what a caller wants (probabilities, not logits)."""
    return _Answering(model.float()).eval()


def real_inputs(batches: Any) -> list[tuple[Tensor, ...]]:
    """The inputs, without the labels, of up to three batches spread over a split."""
    every = max(1, len(batches) // 3)
    chosen = [batch for number, batch in enumerate(batches) if number % every == 0][:3]
    return [tuple(batch[:-1]) for batch in chosen]


def given_to(model: Any, kind: str, batches: Any) -> tuple[Inputs, list[tuple[Tensor, ...]]]:
    """What a model takes, and examples of it: off data of `kind`, or drawn where the model is a generator."""
    if model.task == "generation":
        return LATENT, [(model.draw_latents(32, seed),) for seed in range(3)]
    return INPUTS[kind], real_inputs(batches)


def write(model: nn.Module, inputs: Inputs, examples: Sequence[tuple[Tensor, ...]], path: Path, *, opset: int) -> None:
    """Exports to `path`; its bytes depend on the model alone."""
    import onnx

    # Three examples, so that no free dimension has the size one, which the exporter would take for fixed.
    given = tuple(value[:3] for value in examples[-1])
    dimensions: dict[str, Any] = {}
    for sizes in inputs.free:
        dimensions |= {
            name: torch.export.Dim(name, min=1, max=65536 if name == "batch" else 100_000) for name in sizes.values()
        }
    shapes = tuple({place: dimensions[name] for place, name in sizes.items()} for sizes in inputs.free)
    with quiet():
        program = torch.onnx.export(
            answering(without_transposed(model)),
            given,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs.names),
            output_names=["output"],
            dynamic_shapes=(shapes,),
            custom_translation_table=getattr(model, "onnx_operators", dict)(),
            verbose=False,
            external_data=False,
        )
    exported = program.model_proto  # type: ignore[union-attr]
    # The exporter notes stack traces with this machine's paths: of no use to a caller, and other bits on each machine.
    for place in (exported, exported.graph, *exported.graph.node, *exported.graph.value_info, *exported.graph.input):
        del place.metadata_props[:]
    for node in exported.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(exported)
    path.write_bytes(exported.SerializeToString(deterministic=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress notes and warnings of those who write graphs; what they raise is raised."""
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


def feed(inputs: Inputs, given: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The inputs by their names, as a session takes them."""
    return {name: value.numpy() for name, value in zip(inputs.names, given, strict=True)}


def largest_difference(
    model: nn.Module, inputs: Inputs, examples: Sequence[tuple[Tensor, ...]], path: Path, tolerance: float
) -> float:
    """The largest absolute difference between the exported model's answers and PyTorch's, over several batch sizes.

    Raises:
        Failure: it is above `tolerance`, or an answer has another shape.
    """
    original, exported = answering(model), session(path)
    largest = 0.0
    for size in (1, 2, 7, 32):
        for batch in examples:
            given = tuple(value[:size] for value in batch)
            if len(inputs.names) > 1:  # texts: those of a smaller batch are shorter, another length with each size
                given = (given[0][:, : int(given[1].max())], *given[1:])
            with torch.inference_mode():
                wanted = original(*given).numpy()
            found = exported.run(None, feed(inputs, given))[0]
            if found.shape != wanted.shape:
                raise Failure(
                    f"{path}: answers with shape {found.shape} where PyTorch gives {wanted.shape}; not exported"
                )
            largest = float(np.maximum(largest, np.abs(found - wanted).max()))  # unlike max, it keeps a NaN
    if not largest <= tolerance:
        raise Failure(
            f"{path}: answers differ from PyTorch's by up to {largest:.2e}, export.tolerance is {tolerance:g}; "
            "not exported"
        )
    return largest


def latency(
    model: nn.Module,
    inputs: Inputs,
    examples: Sequence[tuple[Tensor, ...]],
    graphs: Mapping[str, Path],
    wanted: Export,
) -> list[dict[str, float]]:
    """Median milliseconds a batch, PyTorch eager and the graphs by their names in turn, one thread each.

    Returns:
        A row per batch size: `batch`, `pytorch_ms`, and of each graph `NAME_ms` and `NAME_speedup` against PyTorch.
    """
    original, exported = answering(model), [session(path, threads=1) for path in graphs.values()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for size in wanted.latency_batches:
            given = tuple(_repeated(value, size) for value in examples[len(examples) // 2])
            calls = [partial(each.run, None, feed(inputs, given)) for each in exported]
            with torch.inference_mode():
                eager, *others = _medians([partial(original, *given), *calls], wanted.latency_seconds)
            row = {"batch": size, "pytorch_ms": eager}
            for name, found in zip(graphs, others, strict=True):
                row |= {f"{name}_ms": found, f"{name}_speedup": eager / found}
            rows.append(row)
    finally:
        torch.set_num_threads(threads)
    return rows


def _repeated(values: Tensor, size: int) -> Tensor:
    return values[torch.arange(size) % len(values)]


def _medians(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median milliseconds of each call, taken in turn so that a noisy moment hits all alike."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    for _ in islice(iter(int, 1), 1000):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - start))
        if time.perf_counter() > end and len(times[0]) >= 3:
            break
    return [float(np.median(found)) for found in times]
