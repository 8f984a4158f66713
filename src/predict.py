"""Answers from an exported model, with ONNX Runtime alone: torch is not imported.

python -m src.predict experiments/cifar10_resnet/export photo.png
python -m src.predict experiments/cifar10_resnet/export photo.png --int8     (exported with export.int8=true)
python -m src.predict experiments/imdb_lstm/export "A film that I would see again."
python -m src.predict experiments/imdb_lstm/export review.txt
python -m src.predict experiments/facades_pix2pix/export labels.png --output photo.png
python -m src.predict experiments/mnist_gan/export --count 64 --seed 7 --output digits.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from src import tasks
from src.common.errors import Failure
from src.common.files import sha256_of
from src.tasks import Answer, Request, Task


class Predictor:
    """An exported model: its graph, in fp32 or int8, and its signature.json.

    Raises:
        Failure: the folder holds no such exported model, or a damaged one.
    """

    def __init__(self, folder: Path, *, int8: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.signature: dict[str, Any] = json.loads((folder / "signature.json").read_text())
            self.task: Task = tasks.load(self.signature["task"])
            # ONNX Runtime takes a flipped bit as it is.
            graph, digest = (folder / "model.int8.onnx", "int8_sha256") if int8 else (folder / "model.onnx", "sha256")
            if int8 and digest not in self.signature:
                raise ValueError("it was exported without export.int8=true")
            if sha256_of(graph) != self.signature.get(digest):
                raise ValueError(f"{graph.name} is damaged: its sha256 is not the one in signature.json")
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's have no base class of their own
            reason = " ".join(str(error).split())
            raise Failure(
                f"{folder} holds no exported model that is whole ({reason}): name an export/ folder, "
                "e.g. experiments/NAME/export, or export again"
            ) from None

    def answer(self, request: Request) -> Answer:
        """The model's answer to a request.

        Raises:
            Failure: there is no input, or it can't be read.
        """
        outputs = self.session.run(list(self.task.outputs), self.task.encode(request, self.signature))
        return self.task.decode(outputs, request, self.signature)


def predict(folder: Path, request: Request, output: Path | None, *, int8: bool = False) -> None:
    """Prints the answer's lines, and writes its picture.

    Raises:
        Failure: the model or the input can't be read, or the picture can't be written.
    """
    predictor = Predictor(folder, int8=int8)
    if predictor.signature["profile"] == "sample":
        print(
            "note: this model was trained on the sample profile; it shows that the pipeline works, no more",
            file=sys.stderr,
        )
    answer = predictor.answer(request)
    for line in answer.lines:
        print(line)
    if answer.picture is not None:
        write_picture(answer.picture, output or answer.file)


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Writes a picture, uint8 [H, W] or [H, W, 3], and prints where.

    Raises:
        Failure: it can't be written there.
    """
    from PIL import Image

    try:
        Image.fromarray(pixels).save(path)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} can't be written ({error}): give --output NAME.png in a folder that is there") from None
    print(path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m src.predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an export/ folder")
    parser.add_argument("input", nargs="?", help="an image file, a text, or a text file; none for a generator")
    parser.add_argument("--output", type=Path, help="where a picture is written (default: beside the input)")
    parser.add_argument("--top", type=int, default=5, help="how many classes are shown (default: 5)")
    parser.add_argument("--count", type=int, default=16, help="how many images a generator draws (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn from (default: 0)")
    parser.add_argument("--int8", action="store_true", help="the model in int8: smaller, faster, a little less exact")
    arguments = parser.parse_args()
    try:
        request = Request(arguments.input, top=arguments.top, count=arguments.count, seed=arguments.seed)
        predict(arguments.folder, request, arguments.output, int8=arguments.int8)
    except Failure as error:
        print(f"predict failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
