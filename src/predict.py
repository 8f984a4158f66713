"""Answers from an exported model, with ONNX Runtime alone: torch is not imported.

python -m src.predict experiments/cifar10_resnet/export photo.png
python -m src.predict experiments/cifar10_resnet/export photo.png --int8     (exported with export.int8=true)
python -m src.predict experiments/cifar10_resnet/export photos/ other.png --top 1 --format csv
find photos -name "*.png" | python -m src.predict experiments/cifar10_resnet/export - --format json
python -m src.predict experiments/imdb_lstm/export "A film that I would see again."
python -m src.predict experiments/imdb_lstm/export review.txt
python -m src.predict experiments/conll_lstm/export "My name is Wolff. I live in Berlin" --format json
python -m src.predict experiments/facades_pix2pix/export labels.png --output photo.png
python -m src.predict experiments/facades_pix2pix/export labels/ --output photos/
python -m src.predict experiments/bccd_ssd/export photo.jpg --output boxes.png --format json
python -m src.predict experiments/horse2zebra_cyclegan/export zebra.jpg --to A --output horse.png
python -m src.predict experiments/mnist_gan/export --count 64 --seed 7 --output digits.png
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from src import tasks
from src.common.errors import Failure
from src.common.files import sha256_of
from src.data import kinds
from src.data.kinds import Feed
from src.tasks import Answer, Request, Task

BATCH = 32  # inputs that the graph answers at once
STDIN = "-"


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
        names = self.task.outputs_for(request)
        outputs = self._run(names, self.task.encode(request, self.signature))
        return self.task.decode(outputs, request, self.signature)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer | Failure]]:
        """The answers to requests for the same outputs with an input each, in their order, from one call of the graph.

        Where an input can't be read the Failure that says why.
        """
        names = self.task.outputs_for(requests[0])
        feeds: dict[int, Feed] = {}
        failures: dict[int, Failure] = {}
        for index, request in enumerate(requests):
            try:
                feeds[index] = self.task.encode(request, self.signature)
            except Failure as error:
                failures[index] = error
        outputs = self._outputs(names, list(feeds.values())) if feeds else iter(())
        for index, request in enumerate(requests):
            if index in failures:
                yield request, failures[index]
            else:
                yield request, self.task.decode(next(outputs), request, self.signature)

    def _outputs(self, names: Sequence[str], feeds: Sequence[Feed]) -> Iterator[list[np.ndarray]]:
        """The named outputs for each feed of one example."""
        joined = self.task.inputs(self.signature["kind"]).joined(feeds)
        outputs = self._run(names, joined)
        if all(len(output) == len(feeds) for output in outputs):
            return ([output[i : i + 1] for output in outputs] for i in range(len(feeds)))
        return (self._run(names, feed) for feed in feeds)  # as many rows as there is in an example

    def _run(self, names: Sequence[str], feed: Feed) -> list[np.ndarray]:
        """The named outputs; what only others need is not computed."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = len(names) < len(self.task.outputs)
        outputs: list[np.ndarray] = self.session.run(list(names), feed, options)
        return outputs

    def sources(self, inputs: Sequence[str]) -> Iterator[str]:
        """The single inputs: the files of a folder and all below it, by name, and the lines of stdin for `-`.

        Hidden files, and those of another suffix than the kind's, are passed over; so are empty lines.

        Raises:
            Failure: a folder has no such file.
        """
        for source in inputs:
            if source == STDIN:
                yield from (line for line in map(str.strip, sys.stdin) if line)
            elif _is_folder(source):
                suffixes = kinds.load(self.signature["kind"]).suffixes
                folder = Path(source)
                files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes]
                shown = [path for path in files if not _is_hidden(path.relative_to(folder)) and path.is_file()]
                if not shown:
                    raise Failure(f"{source} holds no file that ends in {', '.join(suffixes)}")
                yield from map(str, shown)
            else:
                yield source


def _is_folder(source: str) -> bool:
    return 0 < len(source) < 250 and Path(source).is_dir()  # the system refuses to look for longer names


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class TextWriter:
    """Prints answers as a reader looks at them, under their inputs' names where there are several."""

    def __init__(self, *, names_inputs: bool) -> None:
        self.names_inputs = names_inputs

    def write(self, source: str | None, answer: Answer) -> None:
        """Prints an answer."""
        if self.names_inputs:
            print(f"{source}:")
        for line in answer.lines:
            print(line)


class JsonWriter:
    """Prints a JSON object a line: `input`, and `answers`, a list."""

    def write(self, source: str | None, answer: Answer) -> None:
        """Prints an answer."""
        rows = _rows(answer)
        if answer.rows is not None and answer.written:
            rows.append(_picture_row(answer.written))
        print(json.dumps({"input": source, "answers": rows}, ensure_ascii=False))


class CsvWriter:
    """Prints a CSV table with a header: a row for each of an input's answers."""

    def __init__(self) -> None:
        self.table: csv.DictWriter[str] | None = None

    def write(self, source: str | None, answer: Answer) -> None:
        """Prints an answer."""
        for row in _rows(answer):
            columns = {"input": source, **row}
            if self.table is None:
                self.table = csv.DictWriter(sys.stdout, list(columns), lineterminator="\n")
                self.table.writeheader()
            self.table.writerow(columns)


def _rows(answer: Answer) -> list[Mapping[str, Any]]:
    """An answer's rows; without rows of its own its picture, or its lines."""
    if answer.rows is not None:
        return list(answer.rows)
    return [_picture_row(answer.written)] if answer.written else [{"answer": line} for line in answer.lines]


def _picture_row(path: Path) -> dict[str, str]:
    return {"picture": str(path)}


def predict(
    folder: Path,
    inputs: Sequence[str],
    request: Request,
    output: Path | None,
    *,
    int8: bool = False,
    form: str = "text",
) -> None:
    """Prints the answers, in the order of the inputs, and writes their pictures.

    `request`: what is asked of every input. `output`: the picture of one input or of none, or the folder for those of
    several. Of several inputs one that can't be read is named, and the others are answered.

    Raises:
        Failure: the model or an input can't be read, or a picture can't be written.
    """
    predictor = Predictor(folder, int8=int8)
    if predictor.signature["profile"] == "sample":
        print(
            "note: this model was trained on the sample profile; it shows that the pipeline works, no more",
            file=sys.stderr,
        )
    is_single = len(inputs) < 2 and not any(source == STDIN or _is_folder(source) for source in inputs)
    writer: TextWriter | JsonWriter | CsvWriter = (
        JsonWriter() if form == "json" else CsvWriter() if form == "csv" else TextWriter(names_inputs=not is_single)
    )
    if is_single:
        request = replace(request, source=inputs[0] if inputs else None)
        answer = predictor.answer(request)
        writer.write(request.source, _with_picture(answer, output or answer.file))
        return
    requests = (replace(request, source=source) for source in predictor.sources(inputs))
    count = failures = 0
    pictures: dict[str, str] = {}  # the input of each
    while batch := list(islice(requests, BATCH)):
        for asked, result in predictor.answers(batch):
            source = str(asked.source)
            count += 1
            if isinstance(result, Failure):
                failures += 1
                print(str(result) if str(result).startswith(source) else f"{source[:80]}: {result}", file=sys.stderr)
                continue
            if result.picture is not None:
                if output is None:
                    raise Failure("--output: several inputs give several pictures; give a folder for them")
                if (other := pictures.setdefault(result.file.name, source)) != source:
                    raise Failure(f"{output / result.file.name} would be the picture of {other} and of {source}")
                output.mkdir(parents=True, exist_ok=True)
                result = _with_picture(result, output / result.file.name)
            writer.write(source, result)
        sys.stdout.flush()
    if failures:
        raise Failure(f"{failures} of {count} inputs could not be read; they are named above")


def _with_picture(answer: Answer, path: Path) -> Answer:
    """An answer whose picture, if it has one, is written to the path, with the path among its lines.

    Raises:
        Failure: it can't be written there.
    """
    if answer.picture is None:
        return answer
    write_picture(answer.picture, path)
    return replace(answer, lines=[*answer.lines, str(path)], written=path)


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Writes a picture, uint8 [H, W] or [H, W, 3].

    Raises:
        Failure: it can't be written there.
    """
    from PIL import Image

    try:
        Image.fromarray(pixels).save(path)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} can't be written ({error}): give --output NAME.png in a folder that is there") from None


def main() -> None:
    """The command; exit codes: 0 answered, 1 the model or an input can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m src.predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an export/ folder")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="input",
        help="image files, texts, text files, or folders of files; - for a line of stdin each; none for a generator",
    )
    parser.add_argument(
        "--output", type=Path, help="where a picture is written (default: beside the input); of several inputs a folder"
    )
    parser.add_argument("--format", choices=["text", "csv", "json"], default="text", help="json: an object a line")
    parser.add_argument("--top", type=int, default=5, help="how many classes are shown (default: 5)")
    parser.add_argument("--count", type=int, default=16, help="how many images a generator draws (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn from (default: 0)")
    parser.add_argument("--to", help="A or B: the domain that a model of unpaired domains translates into (default: B)")
    parser.add_argument("--int8", action="store_true", help="the model in int8: smaller, faster, a little less exact")
    arguments = parser.parse_args()
    try:
        request = Request(top=arguments.top, count=arguments.count, seed=arguments.seed, to=arguments.to)
        predict(
            arguments.folder,
            arguments.inputs,
            request,
            arguments.output,
            int8=arguments.int8,
            form=arguments.format,
        )
    except Failure as error:
        print(f"predict failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
