"""Exported graphs in int8: convolutions and matrix products on bytes, a quarter of the size.

Weights are scaled channel by channel, activations by the range that they had on training examples (Jacob et al., 2018).
What that costs is measured on the validation split, on the graph itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from src.common.errors import Failure
from src.exporting.onnx_export import Inputs, feed, quiet, session

CALIBRATION = 256  # examples, at most, whose activations are looked at
AT_ONCE = 8
QUANTIZED = ["Conv", "Gemm", "MatMul"]
# Sums over the examples of a batch, of answers and labels or target.
FIGURES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "classification": ("accuracy", lambda answer, labels: (answer.argmax(1) == labels).sum()),
    "translation": ("l1", lambda answer, target: np.abs(answer - target / 255).mean((1, 2, 3)).sum()),
}
RECURRENT = {"LSTM", "GRU", "RNN"}  # the library's static quantization can't take them


def write_int8(graph: Path, inputs: Inputs, examples: Sequence[tuple[Tensor, ...]], path: Path) -> None:
    """Quantizes the exported `graph` to `path`; `examples` are batches of training inputs.

    Raises:
        Failure: the graph has recurrent layers.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    found = RECURRENT & {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    if found:
        raise Failure(
            f"export.int8: the exported model has {' and '.join(sorted(found))} layers, and only convolutions and "
            "matrix products can be had in int8; export it without"
        )
    share = -(-CALIBRATION // len(examples))
    pieces = [tuple(value[:share].split(AT_ONCE) for value in batch) for batch in examples]
    feeds = iter([feed(inputs, given) for batch in pieces for given in zip(*batch, strict=True)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        whole = Path(folder) / "whole.onnx"  # constants folded, shapes inferred
        quant_pre_process(graph, whole, skip_symbolic_shape=True)
        quantize_static(
            whole,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def cost(graph: Path, int8: Path, inputs: Inputs, batches: Iterable[tuple[Tensor, ...]], task: str) -> dict[str, float]:
    """What int8 costs on validation batches, which begin with the inputs and end with the labels or the target.

    Returns:
        `int8_difference`, the mean absolute difference of the two graphs' answers. Where there is something to compare
        them with also `val_FIGURE_onnx` and `val_FIGURE_int8`, FIGURE being `accuracy` (a share) or `l1` (in 0..1).
    """
    both = [session(path) for path in (graph, int8)]
    name, good = FIGURES.get(task, ("", None))
    distance, sums, answers, examples = 0.0, np.zeros(2), 0, 0
    for batch in batches:
        given = feed(inputs, batch[: len(inputs.names)])
        whole, small = (each.run(None, given)[0] for each in both)
        distance += float(np.abs(whole - small).sum(dtype=np.float64))
        answers, examples = answers + whole.size, examples + len(whole)
        if good:
            sums += [good(answer, batch[-1].numpy()) for answer in (whole, small)]
    figures = dict(zip((f"val_{name}_onnx", f"val_{name}_int8"), (sums / examples).tolist(), strict=True))
    return {"int8_difference": distance / answers} | (figures if good else {})
