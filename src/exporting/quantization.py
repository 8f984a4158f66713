"""Exported graphs in int8: convolutions and matrix products on bytes, a quarter of the size.

Weights are scaled channel by channel, activations by the range that they had on training examples (Jacob et al., 2018).
What that costs is measured on the validation split, on the graph itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from src.common.errors import Failure
from src.data.kinds import Inputs
from src.exporting.onnx_export import feed, quiet, session

Figure = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float]  # of a graph's outputs for a batch, a total

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
            reduce_range=True,  # 7 bits: AVX2 adds two products in 16 bits, which 8-bit weights overflow
        )


def cost(
    graph: Path, int8: Path, inputs: Inputs, batches: Iterable[tuple[Tensor, ...]], figures: Mapping[str, Figure]
) -> dict[str, float]:
    """What int8 costs on validation batches, which begin with the inputs and end with the labels or the target.

    Returns:
        `int8_difference`, the mean absolute difference of the two graphs' outputs; and of each figure the mean over the
        examples, `val_NAME_onnx` and `val_NAME_int8`.
    """
    sessions = {"onnx": session(graph), "int8": session(int8)}
    totals = {f"val_{name}_{engine}": 0.0 for name in figures for engine in sessions}
    distance, values, examples = 0.0, 0, 0
    for batch in batches:
        feeds, arrays = feed(inputs, batch[: len(inputs.names)]), [part.numpy() for part in batch]
        outputs = {engine: exported.run(None, feeds) for engine, exported in sessions.items()}
        for fp32, quantized in zip(outputs["onnx"], outputs["int8"], strict=True):
            distance += float(np.abs(fp32 - quantized).sum(dtype=np.float64))
            values += fp32.size
        examples += len(batch[0])
        for name, figure in figures.items():
            for engine in sessions:
                totals[f"val_{name}_{engine}"] += figure(outputs[engine], arrays)
    return {"int8_difference": distance / values} | {name: total / examples for name, total in totals.items()}
