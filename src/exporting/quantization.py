"""Exported graphs in int8: convolutions and matrix products on bytes, a quarter of the size.

Weights are scaled channel by channel, activations by the range that they had on training examples (Jacob et al., 2018).
What that costs is measured on the validation split, on the graph itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from src.common.errors import Failure
from src.data.kinds import Inputs
from src.exporting.onnx_export import feed, quiet, session

CALIBRATION = 256  # examples, at most, whose activations are looked at
AT_ONCE = 8
QUANTIZED = ["Conv", "Gemm", "MatMul"]
RECURRENT = {"LSTM", "GRU", "RNN"}  # the library's static quantization can't take them


def write_int8(graph: Path, inputs: Inputs, examples: Sequence[tuple[Tensor, ...]], path: Path) -> None:
    """Quantizes the exported `graph` to `path`; `examples` are batches of training inputs.

    Raises:
        Failure: the graph has recurrent layers.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    operators = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    if recurrent := RECURRENT & operators:
        raise Failure(
            f"export.int8: the exported model has {' and '.join(sorted(recurrent))} layers, and only convolutions and "
            "matrix products can be had in int8; export it without"
        )
    share = -(-CALIBRATION // len(examples))
    pieces = [tuple(value[:share].split(AT_ONCE) for value in batch) for batch in examples]
    feeds = iter([feed(inputs, values) for batch in pieces for values in zip(*batch, strict=True)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        folded = Path(folder) / "folded.onnx"  # constants folded, shapes inferred
        quant_pre_process(graph, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


class Figure(Protocol):
    """A figure of a graph's outputs, by which a task tells what int8 costs."""

    int8_figure: str | None  # its name; None: outputs have nothing to be compared with

    def outputs_total(self, outputs: Sequence[np.ndarray], batch: Sequence[np.ndarray]) -> float:
        """The figure of the outputs for a batch, its labels or targets last, summed over the examples."""


def cost(
    graph: Path, int8: Path, inputs: Inputs, batches: Iterable[tuple[Tensor, ...]], figure: Figure
) -> dict[str, float]:
    """What int8 costs on validation batches, which begin with the inputs and end with the labels or the target.

    Returns:
        `int8_difference`, the mean absolute difference of the two graphs' outputs. With a figure also
        `val_FIGURE_onnx` and `val_FIGURE_int8`.
    """
    sessions = [session(path) for path in (graph, int8)]
    distance, totals, values, examples = 0.0, [0.0, 0.0], 0, 0
    for batch in batches:
        outputs = [exported.run(None, feed(inputs, batch[: len(inputs.names)])) for exported in sessions]
        for fp32, quantized in zip(*outputs, strict=True):
            distance += float(np.abs(fp32 - quantized).sum(dtype=np.float64))
            values += fp32.size
        examples += len(batch[0])
        if figure.int8_figure:
            arrays = [part.numpy() for part in batch]
            totals = [total + figure.outputs_total(of, arrays) for total, of in zip(totals, outputs, strict=True)]
    means = {
        f"val_{figure.int8_figure}_{name}": total / examples
        for name, total in zip(("onnx", "int8"), totals, strict=True)
    }
    return {"int8_difference": distance / values} | (means if figure.int8_figure else {})
