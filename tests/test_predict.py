"""`src.predict` with tiny exported models of each task and kind, called as a user calls it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from PIL import Image

from src import predict
from src.common.files import sha256_of
from src.data.kinds.text import TextBatches, TextLoader
from src.data.sets.image_folder import ImageFolders
from src.data.tokens import basic_english
from src.predict import Predictor
from src.tasks import Request
from tests.tiny_data import packed_data, plain_png, png, write_tar

ROOT = Path(__file__).parents[1]
VOCABULARY = ["<unk>", "<pad>", "good", "bad", "film", "."]


def constant(name: str, value: float | list[int]) -> onnx.TensorProto:
    """An initializer: int64 for integers, fp32 for floats."""
    array = np.array(value)
    return numpy_helper.from_array(array.astype(np.float32) if array.dtype.kind == "f" else array, name)


def write_model(
    folder: Path, nodes: list[Any], inputs: list[Any], output: Any, constants: list[Any], **signature: Any
) -> Path:
    graph = helper.make_graph(nodes, "tiny", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    defaults = {"name": "tiny", "profile": "full", "max_tokens": None, "sha256": sha256_of(folder / "model.onnx")}
    (folder / "signature.json").write_text(json.dumps(defaults | signature))
    return folder


def image_model(folder: Path, **signature: Any) -> Path:
    """Classifies images by the brightest of red, green and blue: the softmax of the channels' means."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=T.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["output"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("image", T.UINT8, ["batch", 3, 8, 8])]
    output = helper.make_tensor_value_info("output", T.FLOAT, ["batch", 3])
    constants = [constant("axes", [2, 3]), constant("scale", 0.02)]
    defaults = {"task": "classification", "kind": "images", "shape": [3, 8, 8], "classes": ["red", "green", "blue"]}
    return write_model(folder, nodes, inputs, output, constants, **defaults | signature)


def text_model(folder: Path, **signature: Any) -> Path:
    """Classifies texts by the shares of the words "good" and "bad"."""
    nodes = []
    for word, place in (("bad", 3), ("good", 2)):
        nodes += [
            helper.make_node("Equal", ["tokens", f"id_{word}"], [f"is_{word}"]),
            helper.make_node("Cast", [f"is_{word}"], [f"ones_{word}"], to=T.FLOAT),
            helper.make_node("ReduceSum", [f"ones_{word}", "axes"], [f"sum_{word}"], keepdims=1),
        ]
        assert VOCABULARY[place] == word
    nodes += [
        helper.make_node("Concat", ["sum_bad", "sum_good"], ["sums"], axis=1),
        helper.make_node("Cast", ["lengths"], ["float_lengths"], to=T.FLOAT),
        helper.make_node("Unsqueeze", ["float_lengths", "axes"], ["divisors"]),
        helper.make_node("Div", ["sums", "divisors"], ["output"]),
    ]
    inputs = [
        helper.make_tensor_value_info("tokens", T.INT64, ["batch", "time"]),
        helper.make_tensor_value_info("lengths", T.INT64, ["batch"]),
    ]
    output = helper.make_tensor_value_info("output", T.FLOAT, ["batch", 2])
    constants = [constant("axes", [1]), constant("id_good", 2), constant("id_bad", 3)]
    defaults: dict[str, Any] = {"task": "classification", "kind": "text", "classes": ["neg", "pos"]}
    defaults |= {"vocabulary": VOCABULARY, "tokenizer": basic_english()}
    return write_model(folder, nodes, inputs, output, constants, **defaults | signature)


def pairs_model(folder: Path, **signature: Any) -> Path:
    """Translates a picture into its negative."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=T.FLOAT),
        helper.make_node("Div", ["pixels", "white"], ["light"]),
        helper.make_node("Sub", ["one", "light"], ["output"]),
    ]
    inputs = [helper.make_tensor_value_info("image", T.UINT8, ["batch", 3, 8, 8])]
    output = helper.make_tensor_value_info("output", T.FLOAT, ["batch", 3, 8, 8])
    constants = [constant("white", 255.0), constant("one", 1.0)]
    return write_model(
        folder,
        nodes,
        inputs,
        output,
        constants,
        **{"task": "translation", "kind": "pairs", "shape": [3, 8, 8]} | signature,
    )


def generator(folder: Path, **signature: Any) -> Path:
    """Generates pictures of 2x3 pixels: the sigmoids of the latent vector."""
    nodes = [
        helper.make_node("Sigmoid", ["latent"], ["light"]),
        helper.make_node("Reshape", ["light", "shape"], ["output"]),
    ]
    inputs = [helper.make_tensor_value_info("latent", T.FLOAT, ["batch", 6])]
    output = helper.make_tensor_value_info("output", T.FLOAT, ["batch", 1, 2, 3])
    defaults = {"task": "generation", "kind": "images", "shape": [1, 2, 3], "latent": 6}
    return write_model(folder, nodes, inputs, output, [constant("shape", [-1, 1, 2, 3])], **defaults | signature)


def feed_of(folder: Path, source: object) -> dict[str, np.ndarray]:
    """The feed of an exported model's graph for an input."""
    predictor = Predictor(folder)
    return predictor.task.encode(Request(str(source)), predictor.signature)


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command in this process; returns the exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, words)])
        code = 0
        try:
            predict.main()
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def refused(call: Call) -> Callable[..., str]:
    """Calls the command, which must fail with exit code 1, nothing on stdout and one line on stderr."""

    def refused(*words: object) -> str:
        code, out, err = call(*words)
        assert (code, out) == (1, "")
        assert err.startswith("predict failed: ")
        assert err.count("\n") == 1
        return err

    return refused


# --- images -----------------------------------------------------------------------------------------------------------


def test_classes_are_shown_by_probability(call: Call, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(plain_png((100, 0, 200)))
    code, out, err = call(image_model(tmp_path / "export"), photo)
    assert (code, err) == (0, "")
    shares = np.exp([4.0, 2.0, 0.0])
    shares /= shares.sum()
    assert out.splitlines() == [f"{s:7.2%}  {c}" for s, c in zip(shares, ("blue", "red", "green"), strict=True)]


def test_top_limits_the_classes_that_are_shown(call: Call, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(plain_png((0, 200, 0)))
    _, out, _ = call(image_model(tmp_path / "export"), photo, "--top", 1)
    assert [line.split()[1] for line in out.splitlines()] == ["green"]


def test_a_picture_is_converted_to_the_size_and_mode_of_the_model(tmp_path: Path) -> None:
    left_red = np.zeros((40, 60, 4), np.uint8)
    left_red[:, :30, 0] = left_red[..., 3] = 255
    Image.fromarray(left_red).save(tmp_path / "large.png")
    image = feed_of(image_model(tmp_path / "export"), tmp_path / "large.png")["image"]
    assert (image.shape, image.dtype) == ((1, 3, 8, 8), np.uint8)
    assert (image[0, 0, :, :3] > 200).all()
    assert (image[0, 0, :, 5:] < 50).all()
    assert not image[0, 1:].any()


def test_a_picture_is_read_as_packing_reads_it(tmp_path: Path) -> None:
    """Noise: another interpolation would show in every pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (21, 34, 4), np.uint8)
    names = [f"mine/{split}/{label}/{i}.png" for split in ("train", "test") for label in "ab" for i in range(2)]
    members = {name: png(noise[int(name[-5]) :]) for name in names}
    data = packed_data(ImageFolders(size=8, background="teal"), write_tar(tmp_path / "noise.tar", members))
    folder = image_model(tmp_path / "export", background=data.meta["background"])
    for i, image in enumerate(data.splits["test"]["images"][:2]):
        path = tmp_path / f"{i}.png"
        path.write_bytes(png(noise[i:]))
        assert (feed_of(folder, path)["image"] == image).all()


def test_a_model_of_the_sample_profile_prints_a_note(call: Call, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(plain_png((0, 200, 0)))
    code, out, err = call(image_model(tmp_path / "export", profile="sample"), photo)
    assert code == 0
    assert "sample profile" in err
    assert "sample" not in out


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_comes_from_the_command_line_or_a_file(call: Call, tmp_path: Path) -> None:
    model = text_model(tmp_path / "export")
    text = 'GOOD "film",<br />good film.'
    (tmp_path / "review.txt").write_text(text)
    typed, read = call(model, text), call(model, tmp_path / "review.txt")
    assert typed == read
    # good film , good film .
    assert typed == (0, f"{2 / 6:7.2%}  pos\n{0:7.2%}  neg\n", "")


def test_a_long_text_is_not_taken_for_a_path(call: Call, tmp_path: Path) -> None:
    code, out, _ = call(text_model(tmp_path / "export"), "bad " * 2000)
    assert code == 0
    assert out.splitlines()[0] == "100.00%  neg"


@pytest.mark.parametrize("count", [1, 4, 5, 6, 11])
@pytest.mark.parametrize("limit", [4, 5, None])
def test_a_text_is_truncated_as_in_training(count: int, limit: int | None, tmp_path: Path) -> None:
    words = [VOCABULARY[2 + i % 4] for i in range(count)]
    feed = feed_of(text_model(tmp_path / "export", max_tokens=limit), " ".join(words))
    import torch

    split = {
        "tokens": torch.tensor([VOCABULARY.index(word) for word in words], dtype=torch.int32),
        "offsets": torch.tensor([0, count]),
        "labels": torch.zeros(1, dtype=torch.int64),
    }
    loader = TextLoader(batch_size=1, max_tokens=limit)
    ((tokens, lengths, _),) = TextBatches(split, {"kind": "text", "vocabulary": VOCABULARY}, loader, train=False)
    assert feed["tokens"].tolist() == tokens.tolist()
    assert feed["lengths"].tolist() == lengths.tolist()
    assert feed["tokens"].dtype == feed["lengths"].dtype == np.int64


def test_a_word_that_the_vocabulary_lacks_is_unknown(tmp_path: Path) -> None:
    assert feed_of(text_model(tmp_path / "export"), "Good cinema.")["tokens"].tolist() == [[2, 0, 5]]


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_written_to_output(call: Call, tmp_path: Path) -> None:
    source, target = tmp_path / "labels.png", tmp_path / "photo.png"
    source.write_bytes(plain_png((255, 10, 0)))
    assert call(pairs_model(tmp_path / "export"), source, "--output", target) == (0, f"{target}\n", "")
    assert np.unique(np.asarray(Image.open(target)).reshape(-1, 3), axis=0).tolist() == [[0, 245, 255]]


def test_without_output_a_picture_is_written_beside_its_input(call: Call, tmp_path: Path) -> None:
    source = tmp_path / "labels.png"
    source.write_bytes(plain_png((255, 10, 0)))
    code, out, _ = call(pairs_model(tmp_path / "export"), source)
    assert (code, out) == (0, f"{tmp_path / 'labels-tiny.png'}\n")
    assert Image.open(tmp_path / "labels-tiny.png").size == (8, 8)


@pytest.mark.parametrize("name", ["nowhere/photo.png", "photo.unknown"])
def test_an_output_that_cannot_be_written_is_refused(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    source = tmp_path / "labels.png"
    source.write_bytes(plain_png((255, 10, 0)))
    message = refused(pairs_model(tmp_path / "export"), source, "--output", tmp_path / name)
    assert f"{name} can't be written" in message


# --- generation -------------------------------------------------------------------------------------------------------


def test_count_and_seed_determine_the_pictures_of_a_generator(call: Call, tmp_path: Path) -> None:
    model, target = generator(tmp_path / "export"), tmp_path / "drawn.png"

    def draw(*words: object) -> list[list[int]]:
        assert call(model, *words, "--output", target) == (0, f"{target}\n", "")
        return np.asarray(Image.open(target)).tolist()

    five = draw("--count", 5, "--seed", 1)
    assert np.shape(five) == (2 * 2, 3 * 3)  # two rows of three, the last one missing
    assert np.asarray(five)[2:, 6:].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert draw("--count", 5, "--seed", 1) == five
    assert draw("--count", 5, "--seed", 2) != five
    latents = np.random.default_rng(1).standard_normal((5, 6), np.float32)
    light = np.round(255 / (1 + np.exp(-latents[4]))).reshape(2, 3)
    np.testing.assert_allclose(np.asarray(five)[2:, 3:6], light, atol=1)


def test_a_generator_refuses_an_input_and_a_count_of_zero(refused: Callable[..., str], tmp_path: Path) -> None:
    model = generator(tmp_path / "export")
    assert "tiny takes no input, it draws images: give --count and --seed" in refused(model, "photo.png")
    assert "--count 0: at least one image" in refused(model, "--count", 0)


def test_a_missing_input_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no input: tiny wants an image" in refused(image_model(tmp_path / "images"))
    assert "no input: tiny wants a text" in refused(text_model(tmp_path / "texts"))


# --- several inputs ---------------------------------------------------------------------------------------------------


def photos(folder: Path, count: int) -> list[Path]:
    """Plain pictures in red, green and blue by turns, in a folder beside what is passed over."""
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "photo.png").write_bytes(plain_png((9, 9, 9)))
    (folder / "notes.txt").write_text("no picture")
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(plain_png(((200, 0, 0), (0, 200, 0), (0, 0, 200))[number % 3], (8 + number % 2, 8)))
    return paths


def test_a_folder_is_answered_in_order_as_each_file_alone(call: Call, tmp_path: Path) -> None:
    model, paths = image_model(tmp_path / "export"), photos(tmp_path / "photos", 70)  # more than two batches
    code, out, err = call(model, tmp_path / "photos", "--top", 1, "--format", "csv")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["input"] for row in rows] == list(map(str, paths))
    assert [row["class"] for row in rows] == [("red", "green", "blue")[number % 3] for number in range(70)]
    share = np.exp(4.0) / (np.exp(4.0) + 2)
    assert [float(row["probability"]) for row in rows] == pytest.approx([share] * 70)


def test_the_session_is_called_once_a_batch(tmp_path: Path) -> None:
    predictor = Predictor(image_model(tmp_path / "export"))
    session, sizes = predictor.session, []

    def run(names: list[str], feed: dict[str, np.ndarray], options: Any) -> Any:
        sizes.append(len(feed["image"]))
        return session.run(names, feed, options)

    predictor.session = SimpleNamespace(run=run)
    requests = [Request(str(path)) for path in photos(tmp_path / "photos", 5)]
    assert [request.source for request, _ in predictor.answers(requests)] == [request.source for request in requests]
    assert sizes == [5]


def test_texts_of_several_lengths_are_answered_as_alone(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = text_model(tmp_path / "export")
    texts = ["good", "bad film.", "good good bad . .", "film"]
    alone = [call(model, text)[1] for text in texts]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*texts[:2], "", *texts[2:]]) + "\n"))
    code, out, _ = call(model, "-")
    assert code == 0
    assert out == "".join(f"{text}:\n{answer}" for text, answer in zip(texts, alone, strict=True))


def test_a_json_line_holds_an_input_s_answers(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("good bad\n"))
    _, out, _ = call(text_model(tmp_path / "export"), "good", "-", "--format", "json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert answers == [
        {"input": "good", "answers": [{"class": "pos", "probability": 1.0}, {"class": "neg", "probability": 0.0}]},
        {"input": "good bad", "answers": [{"class": "neg", "probability": 0.5}, {"class": "pos", "probability": 0.5}]},
    ]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_answered(call: Call, tmp_path: Path) -> None:
    model, paths = image_model(tmp_path / "export"), photos(tmp_path / "photos", 4)
    paths[1].write_bytes(b"no picture")
    paths[2].unlink()
    code, out, err = call(model, *paths, "--top", 1)
    assert code == 1
    assert out.splitlines()[::2] == [f"{paths[0]}:", f"{paths[3]}:"]
    damaged, missing, summary = err.splitlines()
    assert damaged.startswith(f"{paths[1]} can't be read as an image")
    assert missing == f"{paths[2]}: no such file"
    assert summary == "predict failed: 2 of 4 inputs could not be read; they are named above"


def test_the_pictures_of_several_inputs_go_into_the_output_folder(call: Call, tmp_path: Path) -> None:
    model, paths, output = pairs_model(tmp_path / "export"), photos(tmp_path / "photos", 3), tmp_path / "new" / "drawn"
    code, out, err = call(model, *paths, "--output", output, "--format", "csv")
    assert (code, err) == (0, "")
    written = [output / f"{path.stem}-tiny.png" for path in paths]
    assert out.splitlines() == ["input,picture", *(f"{a},{b}" for a, b in zip(paths, written, strict=True))]
    assert [tuple(np.asarray(Image.open(path))[0, 0]) for path in written] == [
        (55, 255, 255),
        (255, 55, 255),
        (255, 255, 55),
    ]


def test_several_pictures_without_a_folder_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    model = pairs_model(tmp_path / "export")
    paths = [photos(tmp_path / name, 1)[0] for name in ("a", "b")]
    assert "give a folder for them" in refused(model, *paths)
    assert not list((tmp_path / "a").glob("*-tiny.png"))


def test_a_picture_is_never_written_over_another_one_s(call: Call, tmp_path: Path) -> None:
    paths = [photos(tmp_path / name, 1)[0] for name in ("a", "b")]
    code, _, err = call(pairs_model(tmp_path / "export"), *paths, "--output", tmp_path / "drawn")
    assert code == 1
    assert f"000-tiny.png would be the picture of {paths[0]} and of {paths[1]}" in err


def test_a_folder_without_a_picture_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty holds no file that ends in .png" in refused(image_model(tmp_path / "export"), tmp_path / "empty")


# --- int8 -------------------------------------------------------------------------------------------------------------


def test_int8_selects_the_int8_graph(call: Call, tmp_path: Path) -> None:
    model, photo = image_model(tmp_path / "export"), tmp_path / "photo.png"
    photo.write_bytes(plain_png((0, 200, 0)))
    graph = onnx.load(model / "model.onnx")
    (scale,) = (tensor for tensor in graph.graph.initializer if tensor.name == "scale")
    scale.CopyFrom(constant("scale", -0.02))  # distinguishes the graph: it prefers the darkest channel
    onnx.save(graph, model / "model.int8.onnx")
    signature = json.loads((model / "signature.json").read_text())
    signature["int8_sha256"] = sha256_of(model / "model.int8.onnx")
    (model / "signature.json").write_text(json.dumps(signature))
    assert call(model, photo, "--top", 1)[1].split()[1] == "green"
    assert call(model, photo, "--top", 1, "--int8")[1].split()[1] != "green"


def test_int8_without_an_int8_graph_is_refused_with_the_remedy(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "exported without export.int8=true" in refused(image_model(tmp_path / "export"), "photo.png", "--int8")


def test_a_damaged_int8_graph_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    model = image_model(tmp_path / "export", int8_sha256="0" * 64)
    (model / "model.int8.onnx").write_bytes((model / "model.onnx").read_bytes())
    assert "model.int8.onnx is damaged" in refused(model, "photo.png", "--int8")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("signature.json", None),
        ("signature.json", b'{"name": "ti'),
        ("model.onnx", None),
        ("model.onnx", b""),
        ("model.onnx", b"no graph at all"),
    ],
)
def test_a_damaged_folder_is_refused_and_named(
    name: str, content: bytes | None, refused: Callable[..., str], tmp_path: Path
) -> None:
    model = image_model(tmp_path / "export")
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    message = refused(model, "photo.png")
    assert f"{model} holds no exported model" in message
    assert "name an export/ folder" in message


def test_a_missing_folder_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere holds no exported model" in refused(tmp_path / "nowhere", "photo.png")


@pytest.mark.parametrize("make", [image_model, pairs_model])
def test_a_missing_picture_is_refused(
    make: Callable[[Path], Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    assert "nowhere.png: no such file" in refused(make(tmp_path / "export"), tmp_path / "nowhere.png")


@pytest.mark.parametrize("content", [b"", b"no picture", plain_png((1, 2, 3), (64, 64))[:50]])
def test_an_unreadable_picture_is_refused(content: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(content)
    assert "photo.png can't be read as an image" in refused(image_model(tmp_path / "export"), photo)


def test_a_missing_text_file_is_not_taken_for_a_review(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere.txt: no such file" in refused(text_model(tmp_path / "export"), "nowhere.txt")


@pytest.mark.parametrize("text", ["", "  ", "<br />", '""'])
def test_a_text_without_a_word_is_refused(text: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "the text has no word in it" in refused(text_model(tmp_path / "export"), text)


# --- as a command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [image_model, text_model])
def test_torch_is_not_imported(make: Callable[[Path], Path], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(plain_png((0, 0, 255)))
    code = "import sys; from src.predict import main; main(); print([m for m in sys.modules if m.startswith('torch')])"
    words = [make(tmp_path / "export"), photo if make is image_model else "bad"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    answer, *_, modules = done.stdout.splitlines()
    assert answer.split()[1] == ("blue" if make is image_model else "neg")
    assert modules == "[]"
