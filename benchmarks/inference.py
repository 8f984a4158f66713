"""Inference: PyTorch against the exported ONNX graph, in fp32 and int8, at two batch sizes and thread counts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.setting import Setting
from benchmarks.table import Figure, Target, at_least
from benchmarks.timing import paired, per_call
from src import tasks
from src.common.hardware import cores
from src.data import packed
from src.data.batching import batches, spread
from src.data.kinds import Inputs
from src.exporting import onnx_export, quantization
from src.models.base import Model
from src.training import determinism

SPEED_UP: dict[str, Target] = {"images": at_least(1.8), "pairs": at_least(1.8)}  # at batch 1
SECONDS = 0.2  # length of a turn; a call that takes longer runs once
BATCHES = (1, 32)
LARGE_ROUNDS = 3  # a U-Net takes seconds for 32 pictures


def measure(setting: Setting) -> list[Figure]:
    """The models of all experiments, with random weights: the speed does not depend on them."""
    return [figure for name in setting.experiments for figure in measure_one(name, setting)]


def measure_one(name: str, setting: Setting) -> list[Figure]:
    """The figures of one experiment's model.

    Raises:
        Failure: the outputs of the exported model differ.
    """
    config = setting.prepare(name)
    determinism.fix(config.seed, None)
    meta = packed.read_meta(config.processed)
    model: Model = config.model(meta)
    _, task = tasks.of(config)
    inputs = task.inputs(meta["kind"])
    val = spread(batches(config.processed, "val", config.loader, train=False), onnx_export.EXAMPLES)
    examples = onnx_export.example_inputs(inputs, task.batches(model, val))
    path = setting.folder / f"{name}.onnx"
    onnx_export.write(model, inputs, task.outputs, examples, path)
    # Two examples of the middle length show that it is the same function; export itself checks more.
    few = [tuple(values[:2] for values in examples[len(examples) // 2])]
    onnx_export.largest_difference(model, inputs, few, path, config.export.tolerance)
    graphs = {"ONNX Runtime": path}
    if meta["kind"] != "text":
        graphs["ONNX Runtime, int8"] = int8 = setting.folder / f"{name}.int8.onnx"
        quantization.write_int8(path, inputs, few, int8)  # the speed does not depend on the ranges
    figures = []
    for threads in dict.fromkeys((1, cores())):
        for size in BATCHES:
            rounds = setting.rounds if size == 1 else min(LARGE_ROUNDS, setting.rounds)
            target = SPEED_UP.get(meta["kind"]) if size == 1 else None
            batch = tuple(values[torch.arange(size) % len(values)] for values in examples[len(examples) // 2])
            label = f"inference {name}, batch {size}, {threads} thread{'s' * (threads > 1)}"
            figures += _measure_batch(label, model, inputs, batch, graphs, threads, rounds, target)
    return figures


def _measure_batch(
    label: str,
    model: Model,
    inputs: Inputs,
    batch: tuple[Tensor, ...],
    graphs: Mapping[str, Path],
    threads: int,
    rounds: int,
    target: Target | None,
) -> list[Figure]:
    """Milliseconds per batch of PyTorch and of each graph, and the speed of the graphs relative to PyTorch."""
    original = onnx_export.answering(model)
    feed = onnx_export.feed(inputs, batch)

    def eager() -> Any:
        with torch.inference_mode():
            return original(*batch)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sessions = {name: onnx_export.session(path, threads) for name, path in graphs.items()}
        exported = {name: per_call(partial(session.run, None, feed), SECONDS) for name, session in sessions.items()}
        times = paired({"PyTorch eager": per_call(eager, SECONDS)} | exported, rounds)
    finally:
        torch.set_num_threads(before)
    eager_ms = Figure(label, "PyTorch eager", times.spread("PyTorch eager", lambda s: 1000 * s), "ms")
    figures = [eager_ms]
    for name in graphs:
        figures += [
            Figure(label, name, times.spread(name, lambda s: 1000 * s), "ms"),
            Figure(label, f"speed of {name} / eager", times.ratio("PyTorch eager", name), "x", target),
        ]
    return figures
