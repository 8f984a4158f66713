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
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.common.errors import Failure
from src.common.files import sha256_of


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
            # ONNX Runtime takes a flipped bit as it is.
            graph, written = (folder / "model.int8.onnx", "int8_sha256") if int8 else (folder / "model.onnx", "sha256")
            if int8 and written not in self.signature:
                raise ValueError("it was exported without export.int8=true")
            if sha256_of(graph) != self.signature.get(written):
                raise ValueError(f"{graph.name} is damaged: its sha256 is not the one in signature.json")
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
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

    def latents(self, count: int, seed: int) -> np.ndarray:
        """What a generator draws images from: float32 [count, latent], the same for the same seed."""
        return np.random.default_rng(seed).standard_normal((count, self.signature["latent"]), np.float32)

    def run(self, *inputs: np.ndarray) -> np.ndarray:
        """The model's answer: probabilities [B, classes], or pictures float [B, C, H, W] in 0..1."""
        names = [given.name for given in self.session.get_inputs()]
        return self.session.run(None, dict(zip(names, inputs, strict=True)))[0]


def tokenize(text: str, settings: Mapping[str, Any]) -> list[str]:
    """The tokens of a text under a signature's tokenizer settings."""
    text = text.lower() if settings["lowercase"] else text
    for pattern, replacement in settings["substitutions"]:
        text = re.sub(pattern, replacement, text)
    return text.split()


def predict(
    folder: Path, given: str | None, output: Path | None, *, top: int, count: int, seed: int, int8: bool = False
) -> None:
    """Prints classes with their probabilities, or writes the picture.

    A generator takes no input: it draws `count` images from `seed`, which are written as one picture.

    Raises:
        Failure: the model or the input can't be read.
    """
    predictor = Predictor(folder, int8=int8)
    signature = predictor.signature
    if signature["profile"] == "sample":
        print(
            "note: this model was trained on the sample profile; it shows that the pipeline works, no more",
            file=sys.stderr,
        )
    if signature["task"] == "generation":
        if given is not None:
            raise Failure(f"{given}: {signature['name']} takes no input, it draws images: give --count and --seed")
        if count < 1:
            raise Failure(f"--count {count}: at least one image must be asked for")
        drawn = tiled(predictor.run(predictor.latents(count, seed)))
        write_picture(drawn, output or Path(f"{signature['name']}-{seed}.png"))
        return
    if given is None:
        raise Failure(f"no input: {signature['name']} wants {'a text' if signature['kind'] == 'text' else 'an image'}")
    path = Path(given)
    is_file = len(given) < 250 and path.is_file()  # the system refuses to look for longer names
    is_text = signature["kind"] == "text"
    if not is_file and (not is_text or re.fullmatch(r"\S+\.txt", given)):
        raise Failure(f"{given}: no such file")
    if is_text:
        answer = predictor.run(*predictor.tokens(path.read_text(errors="replace") if is_file else given))[0]
    else:
        answer = predictor.run(predictor.image(path))[0]
    if signature["task"] != "classification":
        write_picture(answer, output or path.with_name(f"{path.stem}-{signature['name']}.png"))
        return
    for place in np.argsort(-answer, kind="stable")[:top]:
        print(f"{answer[place]:7.2%}  {signature['classes'][place]}")


def tiled(images: np.ndarray) -> np.ndarray:
    """Images [N, C, H, W] side by side as one, about as many across as down; missing ones are black."""
    count, channels, height, width = images.shape
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    full = np.concatenate([images, np.zeros((across * down - count, channels, height, width), images.dtype)])
    rows = full.reshape(down, across, channels, height, width).transpose(2, 0, 3, 1, 4)
    return rows.reshape(channels, down * height, across * width)


def write_picture(picture: np.ndarray, target: Path) -> None:
    """Writes a picture, float [C, H, W] in 0..1, and prints where.

    Raises:
        Failure: it can't be written there.
    """
    from PIL import Image

    pixels = (picture.transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8)
    try:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(target)
    except (OSError, ValueError) as error:
        raise Failure(
            f"{target} can't be written ({error}): give --output NAME.png in a folder that is there"
        ) from None
    print(target)


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
        predict(
            arguments.folder,
            arguments.input,
            arguments.output,
            top=arguments.top,
            count=arguments.count,
            seed=arguments.seed,
            int8=arguments.int8,
        )
    except Failure as error:
        print(f"predict failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
