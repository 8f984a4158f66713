"""What each data set reads, draws and refuses, on tiny archives."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.kinds.text import tokenize
from src.data.packed import Packed
from src.data.sets.cifar10 import Cifar10
from src.data.sets.facades import PairedImages
from src.data.sets.image_folder import ImageFolders
from src.data.sets.imdb import BREAK, ReviewFolders, tokenizer_settings
from tests.tiny_data import cifar_members, cifar_records, plain_png, png, write_tar

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def refusal(dataset: Any, archive: Path) -> str:
    """The message of a refusal, which names the archive."""
    with pytest.raises(SourceError) as error:
        dataset.pack(archive)
    assert str(archive) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "some/where/else", "."])
def test_cifar_is_read_in_whatever_folder_it_lies(folder: str, tmp_path: Path) -> None:
    made = Cifar10(val_fraction=0.2).pack(write_tar(tmp_path / "c.tar", cifar_members(folder)))
    assert made.meta["classes"] == ["cat", "ship"]
    assert made.meta["shape"] == [3, 32, 32]
    assert {split: np.bincount(arrays["labels"]).tolist() for split, arrays in made.splits.items()} == {
        "train": [16, 16],
        "val": [4, 4],
        "test": [3, 3],
    }


def test_cifar_records_are_planes_of_red_green_and_blue(tmp_path: Path) -> None:
    record = bytes([1]) + bytes([10]) * 1024 + bytes([20]) * 1024 + bytes(range(32)) * 32
    archive = write_tar(tmp_path / "c.tar", cifar_members("top") | {"top/test_batch.bin": record})
    (image,) = Cifar10().pack(archive).splits["test"]["images"]
    assert image.shape == (3, 32, 32)
    assert (np.unique(image[0]).tolist(), np.unique(image[1]).tolist()) == ([10], [20])
    assert image[2, 5].tolist() == list(range(32))  # rows from left to right


def test_the_validation_part_of_cifar_hangs_on_its_own_seed(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "c.tar", cifar_members())
    once, twice, other = (Cifar10(split_seed=seed).pack(archive).splits["val"]["images"] for seed in (0, 0, 1))
    assert np.array_equal(once, twice)
    assert not np.array_equal(once, other)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "data_batch_2.bin",
            cifar_records([0, 1])[:-1],
            "data_batch_2.bin has 6145 bytes, not a multiple of the 3073 bytes",
        ),
        ("data_batch_1.bin", b"", "data_batch_1.bin has 0 bytes"),
        ("test_batch.bin", cifar_records([0, 2]), "test_batch.bin holds the label 2, but there are 2 classes"),
        ("batches.meta.txt", None, "no batches.meta.txt in it: give CIFAR-10's *binary* version"),
        ("test_batch.bin", None, "test_batch.bin is missing; it holds batches.meta.txt, data_batch_1.bin"),
    ],
)
def test_a_damaged_cifar_is_refused_by_the_file_at_fault(
    name: str, content: bytes | None, told: str, tmp_path: Path
) -> None:
    members = cifar_members("top")
    del members[f"top/{name}"]
    if content is not None:
        members[f"top/{name}"] = content
    assert told in refusal(Cifar10(), write_tar(tmp_path / "c.tar", members))


# --- images in class folders ------------------------------------------------------------------------------------------


def colours(split: str, **counts: int) -> dict[str, bytes]:
    """So many pictures of each colour in a split's class folders, all of them different."""
    pure = {"red": RED, "green": GREEN, "blue": BLUE}
    return {
        f"mine/{split}/{name}/{i}.png": plain_png(tuple(max(0, c - i) for c in pure[name]))  # type: ignore[arg-type]
        for name, count in counts.items()
        for i in range(count)
    }


def test_class_folders_give_classes_by_name_and_pixels_by_channel(tmp_path: Path) -> None:
    members = colours("train", red=10, blue=10) | colours("test", red=2, blue=1) | {"mine/README.txt": b"hello"}
    made = ImageFolders(size=8).pack(write_tar(tmp_path / "i.tar", members))
    assert made.meta["classes"] == ["blue", "red"]
    assert {split: len(arrays["labels"]) for split, arrays in made.splits.items()} == {"train": 18, "val": 2, "test": 3}
    for arrays in made.splits.values():
        for image, label in zip(arrays["images"], arrays["labels"], strict=True):
            bright = image[0 if label else 2]
            assert bright.min() > 200
            assert image.sum() == bright.sum()


def test_a_validation_folder_is_taken_where_there_is_one(tmp_path: Path) -> None:
    members = colours("train", red=3, blue=3) | colours("val", blue=1) | colours("test", red=1)
    made = ImageFolders(size=8).pack(write_tar(tmp_path / "i.tar", members))
    assert {split: arrays["labels"].tolist() for split, arrays in made.splits.items()} == {
        "train": [0, 0, 0, 1, 1, 1],
        "val": [0],
        "test": [1],
    }


def test_images_are_brought_to_one_size_and_to_colour(tmp_path: Path) -> None:
    from PIL import Image

    grey = tmp_path / "grey.png"
    Image.new("L", (5, 9), 100).save(grey)
    members = colours("train", red=2, blue=2) | {
        "mine/test/red/wide.png": plain_png(RED, (40, 10)),
        "mine/test/red/grey.PNG": grey.read_bytes(),
    }
    made = ImageFolders(size=16).pack(write_tar(tmp_path / "i.tar", members))
    assert made.splits["train"]["images"].shape == (2, 3, 16, 16)
    grey_image, wide = made.splits["test"]["images"]
    assert np.unique(grey_image).tolist() == [100]
    assert [np.unique(plane).tolist() for plane in wide] == [[255], [0], [0]]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        (colours("train", red=2, blue=2), "no test/<class>/*.png in it"),
        (colours("test", red=2), "no train/<class>/*.png in it"),
        (colours("train", red=2) | colours("test", red=1), "train/ has only the class 'red': give at least two"),
        (
            colours("train", red=2, blue=2) | colours("test", green=1),
            "test/ has the class 'green' that train/ lacks; train/ has blue, red",
        ),
        (
            colours("train", red=2, blue=2) | {"mine/test/red/a.png": b"no picture"},
            "mine/test/red/a.png can't be read as an image",
        ),
        (
            colours("train", red=2, blue=2) | {"mine/test/red/cut.png": plain_png(RED, (64, 64))[:60]},
            "mine/test/red/cut.png can't be read as an image",
        ),
    ],
)
def test_class_folders_that_make_no_sense_are_refused(members: dict[str, bytes], told: str, tmp_path: Path) -> None:
    assert told in refusal(ImageFolders(size=8), write_tar(tmp_path / "i.tar", members))


# --- reviews ----------------------------------------------------------------------------------------------------------


def reviews(**more: str | bytes) -> dict[str, bytes]:
    """Ten reviews of each kind and split, each with a word of its own; `more` adds files to train/pos."""
    members = {
        f"aclImdb/{split}/{label}/{i}_{rating}.txt": f"common common {split}{label}{i}".encode()
        for split in ("train", "test")
        for label, rating in (("neg", 1), ("pos", 10))
        for i in range(10)
    }
    added = {f"aclImdb/train/pos/{name}.txt": v.encode() if isinstance(v, str) else v for name, v in more.items()}
    return members | {"aclImdb/train/unsup/0_0.txt": b"unlabelled words", "aclImdb/README": b"x"} | added


def read(made: Packed, split: str) -> list[list[str]]:
    """The texts of a split, token by token."""
    arrays, vocabulary = made.splits[split], made.meta["vocabulary"]
    tokens = [vocabulary[i] for i in arrays["tokens"]]
    return [tokens[a:b] for a, b in zip(arrays["offsets"], arrays["offsets"][1:], strict=False)]


def test_reviews_keep_their_labels_their_lengths_and_their_order(tmp_path: Path) -> None:
    made = ReviewFolders().pack(write_tar(tmp_path / "r.tar", reviews()))
    assert made.meta["classes"] == ["neg", "pos"]
    assert {split: np.bincount(arrays["labels"]).tolist() for split, arrays in made.splits.items()} == {
        "train": [9, 9],
        "val": [1, 1],
        "test": [10, 10],
    }
    for split, arrays in made.splits.items():
        assert np.diff(arrays["offsets"]).tolist() == [3] * len(arrays["labels"]), split
    for text, label in zip(read(made, "train"), made.splits["train"]["labels"], strict=True):
        assert text[2].startswith("trainpos" if label else "trainneg")


def test_a_word_that_stands_only_in_val_or_test_is_unknown(tmp_path: Path) -> None:
    made = ReviewFolders().pack(write_tar(tmp_path / "r.tar", reviews()))
    assert made.meta["vocabulary"][:3] == ["<unk>", "<pad>", "common"]
    assert sorted(made.meta["vocabulary"][3:]) == sorted(text[2] for text in read(made, "train"))
    for split in ("val", "test"):
        assert {tuple(text) for text in read(made, split)} == {("common", "common", "<unk>")}


def test_the_vocabulary_is_as_large_as_asked_and_holds_the_most_frequent(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "r.tar", reviews(a="b b b", b="b b b", c="b c c c c c c c"))
    made = ReviewFolders(vocabulary=2, val_fraction=0.01).pack(archive)
    assert made.meta["vocabulary"] == ["<unk>", "<pad>", "common", "b"]
    assert sum("<unk>" in text for text in read(made, "train")) >= 18


def test_breaks_are_removed_and_do_not_join_words(tmp_path: Path) -> None:
    made = ReviewFolders(val_fraction=0.01).pack(
        write_tar(tmp_path / "r.tar", reviews(**{str(i): "One<br />two<BR>three<br/><br >Four." for i in range(2)}))
    )
    assert ["one", "two", "three", "four", "."] in read(made, "train")
    assert not [token for token in made.meta["vocabulary"][2:] if "br" in token or "<" in token]


def test_a_review_of_breaks_alone_keeps_its_place_as_one_unknown_word(tmp_path: Path) -> None:
    members = reviews() | {"aclImdb/test/pos/0_10.txt": b"<br /><br />"}
    made = ReviewFolders().pack(write_tar(tmp_path / "r.tar", members))
    assert len(made.splits["test"]["labels"]) == 20
    assert read(made, "test").count(["<unk>"]) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "train/pos/odd.txt is empty"),
        (b" \n", "train/pos/odd.txt is empty"),
        ("café".encode("latin-1"), "train/pos/odd.txt is not UTF-8 (byte 3)"),
    ],
)
def test_a_review_that_cannot_be_read_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    assert told in refusal(ReviewFolders(), write_tar(tmp_path / "r.tar", reviews(odd=content)))


def test_a_missing_folder_of_reviews_is_named(tmp_path: Path) -> None:
    members = {name: content for name, content in reviews().items() if "test/neg" not in name}
    assert "no test/neg/*.txt in it" in refusal(ReviewFolders(), write_tar(tmp_path / "r.tar", members))


def test_equal_reviews_in_train_and_test_are_reported(tmp_path: Path) -> None:
    members = reviews() | {
        "aclImdb/test/pos/0_10.txt": b"Twice there!",
        "aclImdb/train/pos/0_10.txt": b"twice  there !",
    }
    found = ReviewFolders(val_fraction=0.01).pack(write_tar(tmp_path / "r.tar", members)).meta["duplicates"]
    assert found["train/test"] + found["val/test"] == 1


def nasty_texts() -> Iterable[str]:
    yield from [
        "",
        " ",
        "<br />",
        "<BR/>x<br  >",
        'don\'t "stop"...',
        "a;b:c(d)!?",
        "İstanbul ǅ ſ K ß",
        "\u00a0nbsp\u2003em\x1c\x85",
    ]
    yield from [
        "no<br / >tag <b>r</b>",
        "''",
        '"',
        "tab\tnew\nline\r\n",
        "日本語。",
        "😀!",
        "\x00",
        "a" * 300,
        "<br",
        "br />",
    ]
    alphabet = string.printable + "<br /><BR>'\".,()!?;:İßé\u00a0\u2028"
    noise = random.Random(0)
    for _ in range(300):
        yield "".join(noise.choices(alphabet, k=60))


def test_the_exported_tokenizer_gives_what_the_training_saw(tmp_path: Path) -> None:
    from torchtext.data.utils import get_tokenizer

    from src.data.samples.reviews import draw

    draw(tmp_path / "real.tar.gz", train=100, test=10)
    real = [content.decode() for _, content in read_archive(tmp_path / "real.tar.gz")]
    assert any("<br" in text for text in real)
    basic_english, settings = get_tokenizer("basic_english"), tokenizer_settings()
    for text in [*real, *nasty_texts()]:
        assert tokenize(text, settings) == basic_english(BREAK.sub(" ", text)), repr(text)


def test_many_texts_are_tokenized_in_their_order() -> None:
    from src.data.sets import imdb

    texts = [f"Review {i}, <br />{'very ' * (i % 7)}good." for i in range(2500)]  # enough for several processes
    assert imdb.tokenize(texts) == imdb._tokenize(texts)


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair(left: tuple[int, int, int], right: tuple[int, int, int], size: int = 16) -> bytes:
    halves = [np.full((size, size, 3), colour, np.uint8) for colour in (left, right)]
    return png(np.concatenate(halves, axis=1))


def pairs(**counts: int) -> dict[str, bytes]:
    """Numbered pairs of each split: A red, as bright as its number says, and B blue."""
    return {
        f"facades/{split}/{i}.png": pair((100 + i, 0, 0), (0, 0, 200))
        for split, count in counts.items()
        for i in range(1, count + 1)
    }


@pytest.mark.parametrize(("direction", "red"), [("AtoB", "input"), ("BtoA", "target")])
def test_the_direction_says_which_half_is_the_input(direction: Any, red: str, tmp_path: Path) -> None:
    made = PairedImages(direction=direction, size=8).pack(write_tar(tmp_path / "p.tar", pairs(train=2, val=1, test=1)))
    blue = {"input": "target", "target": "input"}[red]
    for arrays in made.splits.values():
        assert arrays[red].shape[1:] == arrays[blue].shape[1:] == (3, 8, 8)
        assert (arrays[red][:, 0] > 100).all()
        assert (arrays[red][:, 2] == 0).all()
        assert (arrays[blue][:, 2] == 200).all()
        assert (arrays[blue][:, 0] == 0).all()
    assert (made.meta["shape"], made.meta["direction"]) == ([3, 8, 8], direction)


def test_pairs_stand_in_their_natural_order(tmp_path: Path) -> None:
    members = dict(sorted(pairs(train=12, val=1, test=1).items()))  # 1, 10, 11, 12, 2
    made = PairedImages(size=16).pack(write_tar(tmp_path / "p.tar", members))
    assert made.splits["train"]["input"][:, 0, 0, 0].tolist() == list(range(101, 113))


def test_a_validation_part_is_drawn_from_train_where_there_is_none(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "p.tar", pairs(train=10, test=2))

    def shades(seed: int) -> dict[str, list[int]]:
        made = PairedImages(size=16, val_fraction=0.3, split_seed=seed).pack(archive)
        return {split: arrays["input"][:, 0, 0, 0].tolist() for split, arrays in made.splits.items()}

    found = shades(0)
    assert len(found["val"]) == 3
    assert sorted(found["train"] + found["val"]) == list(range(101, 111))
    assert found == shades(0)
    assert any(shades(seed)["val"] != found["val"] for seed in (1, 2))


@pytest.mark.parametrize(
    ("members", "told"),
    [
        (pairs(train=2), "no test/*.jpg in it"),
        (pairs(test=2), "no train/*.jpg in it"),
        (
            pairs(train=2) | {"facades/test/1.png": plain_png(RED, (30, 16))},
            "facades/test/1.png is 30x16: a pair is two squares",
        ),
        (pairs(train=2) | {"facades/test/1.png": b"?"}, "facades/test/1.png can't be read as an image"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(members: dict[str, bytes], told: str, tmp_path: Path) -> None:
    assert told in refusal(PairedImages(size=8), write_tar(tmp_path / "p.tar", members))
