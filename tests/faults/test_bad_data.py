"""Defects in a user's own data: refused with the file's name, or trained on where the data is merely unusual."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.common.errors import Failure
from src.configuration.composing import check, compose, overrides_of
from src.configuration.schema import DataConfig
from src.data.fetching import obtaining
from src.download import download
from src.preprocess import preprocess
from tests.conftest import Run
from tests.faults.commands import output_of
from tests.test_datasets import RED, colours, pairs, reviews
from tests.tiny_data import cifar_members, cifar_records, plain_png

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

BIRDS = """
_target_: src.data.sets.image_folder.ImageFolders
name: birds
size: 16
loader: {batch_size: 50}
"""
OPTIONS = {"facades": {"size": 64, "palette": None}}
Files = dict[str, bytes | None]  # files added to a sound folder; None removes one

SOUND: dict[str, dict[str, bytes]] = {
    "cifar10": cifar_members("mine"),
    "birds": colours("train", red=6, blue=6) | colours("test", red=2, blue=2),
    "imdb": {name.replace("aclImdb", "mine"): content for name, content in reviews().items()},
    "facades": {name.replace("facades", "mine"): content for name, content in pairs(train=3, val=1, test=2).items()},
}
EXPERIMENTS = {
    "cifar10": "cifar10_resnet",
    "birds": "cifar10_resnet",
    "imdb": "imdb_lstm",
    "facades": "facades_pix2pix",
}


@pytest.fixture(autouse=True)
def clean(clone: Path) -> Iterator[None]:
    """Removes the data of the full profile after each test."""
    yield
    for kind in ("raw", "processed"):
        shutil.rmtree(clone / "data" / kind / "full", ignore_errors=True)


def write_files(data: str, changes: Files, folder: Path) -> Path:
    """Writes the data with its changes into `folder`; returns the folder to name as the archive."""
    files: Files = {**SOUND[data], **changes}
    for name, content in files.items():
        path = folder / name
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder / "mine"


def words_for(data: str, changes: Files, folder: Path) -> list[str]:
    """Writes the data into `folder`; returns the overrides that name it."""
    archive = write_files(data, changes, folder)
    words = [f"+experiment={EXPERIMENTS[data]}", "profile=full", f"data.archive={archive}"]
    if data == "birds":
        (folder / "conf" / "data").mkdir(parents=True)
        (folder / "conf" / "data" / "birds.yaml").write_text(BIRDS)
        words = ["--config-dir", str(folder / "conf"), *words, "data=birds"]
    return [*words, *overrides_of(OPTIONS.get(data, {}), "data.")]


def png_with_header(width: int, height: int) -> bytes:
    """A PNG file without pixels whose header declares this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"

REFUSED: dict[str, tuple[str, Files, str]] = {
    "image-truncated": (
        "birds",
        {"mine/train/red/a.png": plain_png(RED, (64, 64))[:60]},
        "a.png can't be read as an image",
    ),
    "image-empty": ("birds", {"mine/train/red/a.png": b""}, "mine/train/red/a.png can't be read as an image"),
    "image-text": ("birds", {"mine/test/red/a.jpg": b"hello"}, "mine/test/red/a.jpg can't be read as an image"),
    "image-postscript": ("birds", {"mine/test/red/a.png": POSTSCRIPT}, "mine/test/red/a.png can't be read as an image"),
    "image-gigapixels": (
        "birds",
        {"mine/train/red/a.png": png_with_header(60_000, 60_000)},
        "mine/train/red/a.png can't be read as an image (Image size (3600000000 pixels) exceeds limit",
    ),
    "image-name-of-two-lines": (
        "birds",
        {"mine/test/red/a\nb.png": b"hello"},
        "a b.png can't be read as an image",
    ),
    "image-name-not-utf8": ("birds", {"mine/test/red/\udcff.png": b"hello"}, "\\udcff.png can't be read as an image"),
    "class-name-not-utf8": (
        "birds",
        {"mine/train/\udcff/a.png": plain_png(RED)},
        r"train/ has the class '\udcff': rename it, a name must be printable UTF-8",
    ),
    "images-of-one-class": (
        "birds",
        {name: None for name in SOUND["birds"] if "blue" in name},
        "train/ has only the class 'red': give at least two",
    ),
    "images-of-a-class-only-in-test": (
        "birds",
        {"mine/test/green/a.png": plain_png(RED)},
        "test/ has the class 'green' that train/ lacks",
    ),
    "images-without-test": (
        "birds",
        {name: None for name in SOUND["birds"] if "/test/" in name},
        "no test/<class>/*.png in it",
    ),
    "one-image-a-class": (
        "birds",
        {name: None for name in SOUND["birds"] if "/train/" in name and not name.endswith("/0.png")},
        "mine: val has no example: val is drawn from classes of two or more",
    ),
    "review-empty": ("imdb", {"mine/train/pos/odd.txt": b""}, "mine/train/pos/odd.txt is empty: remove it"),
    "review-blank": ("imdb", {"mine/test/neg/odd.txt": b" \n\t"}, "mine/test/neg/odd.txt is empty: remove it"),
    "review-latin1": (
        "imdb",
        {"mine/train/neg/odd.txt": "café".encode("latin-1")},
        "mine/train/neg/odd.txt is not UTF-8 (byte 3: 0xe9): give its encoding, e.g. encoding: latin-1, or convert",
    ),
    "review-utf16": (
        "imdb",
        {"mine/train/neg/odd.txt": "cafe".encode("utf-16-le")},
        "mine/train/neg/odd.txt holds zero bytes, the first at byte 1: if it is UTF-16 without a byte-order mark",
    ),
    "reviews-of-one-class": (
        "imdb",
        {name: None for name in SOUND["imdb"] if "train/neg" in name},
        "test/ has the class 'neg' that train/ lacks; train/ has pos",
    ),
    "no-test-reviews": (
        "imdb",
        {name: None for name in SOUND["imdb"] if "test/" in name},
        "no test/<class>/*.txt in it; see docs/your-data.md",
    ),
    "pair-of-the-wrong-size": (
        "facades",
        {"mine/test/1.png": plain_png(RED, (30, 16))},
        "mine/test/1.png is 30x16: a pair is two squares side by side, twice as wide as high",
    ),
    "pair-empty": ("facades", {"mine/train/2.png": b""}, "mine/train/2.png can't be read as an image"),
    "one-pair": (
        "facades",
        {"mine/train/2.png": None, "mine/train/3.png": None, "mine/val/1.png": None},
        "train/ has one pair and val/ none",
    ),
    "records-truncated": (
        "cifar10",
        {"mine/data_batch_2.bin": cifar_records([0, 1])[:-1]},
        "data_batch_2.bin has 6145 bytes, not a multiple of the 3073 bytes of a record",
    ),
    "records-empty": ("cifar10", {"mine/test_batch.bin": b""}, "test_batch.bin has 0 bytes"),
    "records-with-an-unknown-label": (
        "cifar10",
        {"mine/test_batch.bin": cifar_records([0, 2])},
        "test_batch.bin holds the label 2, but there are 2 classes",
    ),
    "records-of-the-python-version": (
        "cifar10",
        {"mine/batches.meta.txt": None, "mine/batches.meta": b"\x80\x02}q\x01."},
        "no batches.meta.txt in it: give CIFAR-10's *binary* version, not the Python one",
    ),
    "no-file": ("cifar10", dict.fromkeys(SOUND["cifar10"]) | {"mine/.DS_Store": b"x"}, "holds no file"),
}


@functools.cache
def section(experiment: str) -> dict[str, Any]:
    """The configuration of an experiment's data on the full profile."""
    content = compose([f"experiment={experiment}", "profile=full", "output=out"]).plain()
    return {"profile": content["profile"], "data": content["data"]}


@pytest.mark.parametrize("name", REFUSED)
def test_defective_data_is_refused_and_the_file_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obtaining, "ROOT", tmp_path)
    data, changes, message = REFUSED[name]
    archive = write_files(data, changes, tmp_path)
    content = copy.deepcopy(section(EXPERIMENTS[data]))
    if data == "birds":
        content["data"] = yaml.safe_load(BIRDS)
    content["data"] |= {"archive": str(archive)} | OPTIONS.get(data, {})
    config = check(content | {"data_folder": str(tmp_path / "data")}, DataConfig)
    with pytest.raises(Failure) as error:  # download checks the folder, preprocess the files
        download(config)
        preprocess(config)
    printed = " ".join(str(error.value).splitlines()).encode(errors="backslashreplace").decode()
    assert message in printed
    assert not list(config.processed.glob("*"))


@pytest.mark.parametrize("name", ["review-latin1", "image-name-of-two-lines", "image-name-not-utf8"])
def test_training_on_defective_data_is_refused_in_one_line(name: str, run: Run, tmp_path: Path) -> None:
    data, changes, message = REFUSED[name]
    done = run("python", "-m", "src.train", *words_for(data, changes, tmp_path), check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("train failed: ") and message in line


TRAINED: dict[str, tuple[str, Files, tuple[str, ...]]] = {
    # 10 training images for a batch of 50; 2 for validation and 2 for testing, both of one class
    "images-fewer-than-a-batch": (
        "birds",
        {name: None for name in SOUND["birds"] if "/test/blue" in name},
        ("model.network.width=8",),
    ),
    # 19 reviews for a batch of 64; one of them holds no word
    "reviews-without-a-word": (
        "imdb",
        {"mine/train/pos/odd.txt": b"<br /><br />", "mine/test/neg/odd.txt": b"<br>"},
        ("model.hidden=8", "model.embedding=8"),
    ),
    # 4 pairs of several sizes for a batch of 16
    "pairs-of-several-sizes": (
        "facades",
        {"mine/train/4.png": plain_png(RED, (80, 40))},
        ("model.width=4", "data.loader.batch_size=16"),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_unusual_but_valid_data_is_trained_and_evaluated(name: str, clone: Path, run: Run, tmp_path: Path) -> None:
    data, changes, small = TRAINED[name]
    words = words_for(data, changes, tmp_path)
    done = run("python", "-m", "src.train", *words, *small, "trainer.max_epochs=2", "trainer.threads=1")
    output = output_of(done.stdout)
    folder = clone / output
    run("python", "-m", "src.evaluate", "-cp", f"../{output}", "-cn", "config")
    losses = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(losses) == 2 and not re.search(r"\b(nan|inf)\b", " ".join(losses))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
