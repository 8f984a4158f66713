"""Answers from an exported model, with ONNX Runtime alone: torch is not imported.

python -m src.predict experiments/cifar10_resnet/export photo.png
python -m src.predict experiments/imdb_lstm/export "A film that I would see again."
python -m src.predict experiments/imdb_lstm/export review.txt
python -m src.predict experiments/facades_pix2pix/export labels.png --output photo.png
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.errors import Failure
from src.files import sha256_of


class Predictor:
    """An exported model: its graph and its signature.json.

    Raises:
        Failure: the folder holds no exported model, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.signature: dict[str, Any] = json.loads((folder / "signature.json").read_text())
            # ONNX Runtime takes a flipped bit as it is.
            if sha256_of(folder / "model.onnx") != self.signature["sha256"]:
                raise ValueError("model.onnx is damaged: its sha256 is not the one in signature.json")
            self.session = onnxruntime.InferenceSession(
                folder / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's have no base class of their own
            why = " ".join(str(error).split())
            raise Failure(
                f"{folder} holds no exported model that is whole ({why}): name an export/ folder, "
                "e.g. experiments/NAME/export, or export again"
            ) from None

    def image(self, path: Path) -> np.ndarray:
        """An image file as uint8 [1, C, H, W], resized to the model's size.

        Raises:
            Failure: it can't be read.
        """
        from PIL import Image

        channels, height, width = self.signature["shape"]
        try:
            image = Image.open(path).convert("RGB" if channels == 3 else "L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Failure(f"{path} is no image that can be read ({error})") from None
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)[None]

    def tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text as token ids int64 [1, T] and lengths int64 [1], cut in the middle as in training.

        Raises:
            Failure: it has no token.
        """
        words = tokenize(text, self.signature["tokenizer"])
        if not words:
            raise Failure("the text has no word in it")
        ids = {token: place for place, token in enumerate(self.signature["vocabulary"])}
        found = [ids.get(word, 0) for word in words]
        limit = self.signature["max_tokens"] or len(found)
        if len(found) > limit:
            found = found[: (limit + 1) // 2] + found[len(found) - limit // 2 :]
        return np.array([found], np.int64), np.array([len(found)], np.int64)

    def run(self, *inputs: np.ndarray) -> np.ndarray:
        """The model's answer: probabilities [B, classes], or pictures float [B, 3, S, S] in 0..1."""
        names = [given.name for given in self.session.get_inputs()]
        return self.session.run(None, dict(zip(names, inputs, strict=True)))[0]


def tokenize(text: str, settings: Mapping[str, Any]) -> list[str]:
    """The tokens of a text under a signature's tokenizer settings."""
    text = text.lower() if settings["lowercase"] else text
    for pattern, replacement in settings["substitutions"]:
        text = re.sub(pattern, replacement, text)
    return text.split()


def predict(folder: Path, given: str, output: Path | None, top: int) -> None:
    """Prints classes with their probabilities, or writes the picture.

    Raises:
        Failure: the model or the input can't be read.
    """
    predictor = Predictor(folder)
    signature = predictor.signature
    if signature["profile"] == "sample":
        print(
            "note: this model was trained on the sample profile; it shows that the pipeline works, no more",
            file=sys.stderr,
        )
    path = Path(given)
    is_file = len(given) < 250 and path.is_file()  # the system refuses to look for longer names
    is_text = signature["kind"] == "text"
    if not is_file and (not is_text or re.fullmatch(r"\S+\.txt", given)):
        raise Failure(f"{given}: no such file")
    if is_text:
        answer = predictor.run(*predictor.tokens(path.read_text(errors="replace") if is_file else given))[0]
    else:
        answer = predictor.run(predictor.image(path))[0]
    if signature["kind"] == "pairs":
        from PIL import Image

        target = output or path.with_name(f"{path.stem}-{signature['name']}.png")
        picture = Image.fromarray((answer.transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8))
        try:
            picture.save(target)
        except (OSError, ValueError) as error:
            raise Failure(
                f"{target} can't be written ({error}): give --output NAME.png in a folder that is there"
            ) from None
        print(target)
        return
    for place in np.argsort(-answer, kind="stable")[:top]:
        print(f"{answer[place]:7.2%}  {signature['classes'][place]}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m src.predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an export/ folder")
    parser.add_argument("input", help="an image file, a text, or a text file")
    parser.add_argument("--output", type=Path, help="where a picture is written (default: beside the input)")
    parser.add_argument("--top", type=int, default=5, help="how many classes are shown (default: 5)")
    arguments = parser.parse_args()
    try:
        predict(arguments.folder, arguments.input, arguments.output, arguments.top)
    except Failure as error:
        print(f"predict failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
