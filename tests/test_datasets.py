"""Data sets on tiny archives: splits, labels, pixels, tokens. (Damaged data: tests/faults/test_bad_data.py.)"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.data.fetching.adopting import adopt
from src.data.fetching.files import SourceError
from src.data.packed import Packed
from src.data.sets.cifar10 import Cifar10
from src.data.sets.facades import PairedImages
from src.data.sets.image_folder import ImageFolders
from src.data.sets.imdb import ReviewFolders
from tests.tiny_data import cifar_members, packed_data, plain_png, png, write_tar

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def refusal(dataset: Any, archive: Path) -> str:
    """Packs an archive; returns the error message, one line that names the archive."""
    with pytest.raises(SourceError) as error:
        packed_data(dataset, archive)
    assert str(archive) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "some/where/else", "."])
def test_cifar_is_read_from_any_folder_of_the_archive(folder: str, tmp_path: Path) -> None:
    data = Cifar10(val_fraction=0.2).pack(write_tar(tmp_path / "c.tar", cifar_members(folder)))
    assert data.meta["classes"] == ["cat", "ship"]
    assert data.meta["shape"] == [3, 32, 32]
    assert {split: np.bincount(arrays["labels"]).tolist() for split, arrays in data.splits.items()} == {
        "train": [16, 16],
        "val": [4, 4],
        "test": [3, 3],
    }


def test_cifar_records_are_red_green_and_blue_planes(tmp_path: Path) -> None:
    record = bytes([1]) + bytes([10]) * 1024 + bytes([20]) * 1024 + bytes(range(32)) * 32
    archive = write_tar(tmp_path / "c.tar", cifar_members("top") | {"top/test_batch.bin": record})
    (image,) = Cifar10().pack(archive).splits["test"]["images"]
    assert image.shape == (3, 32, 32)
    assert (np.unique(image[0]).tolist(), np.unique(image[1]).tolist()) == ([10], [20])
    assert image[2, 5].tolist() == list(range(32))  # rows from left to right


def test_the_validation_split_of_cifar_depends_on_split_seed(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "c.tar", cifar_members())
    first, again, other = (Cifar10(split_seed=seed).pack(archive).splits["val"]["images"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_missing_cifar_file_is_named(tmp_path: Path) -> None:
    members = cifar_members("top")
    del members["top/test_batch.bin"]
    message = refusal(Cifar10(), write_tar(tmp_path / "c.tar", members))
    assert "test_batch.bin is missing; it holds batches.meta.txt, data_batch_1.bin" in message


# --- images in class folders ------------------------------------------------------------------------------------------


def colours(split: str, **counts: int) -> dict[str, bytes]:
    """`counts` different pictures by colour, in a split's class folders."""
    pure = {"red": RED, "green": GREEN, "blue": BLUE}
    return {
        f"mine/{split}/{name}/{i}.png": plain_png(tuple(max(0, c - i) for c in pure[name]))  # type: ignore[arg-type]
        for name, count in counts.items()
        for i in range(count)
    }


def test_class_folders_give_sorted_classes_and_rgb_planes(tmp_path: Path) -> None:
    members = colours("train", red=10, blue=10) | colours("test", red=2, blue=1) | {"mine/README.txt": b"hello"}
    data = packed_data(ImageFolders(size=8), write_tar(tmp_path / "i.tar", members))
    assert data.meta["classes"] == ["blue", "red"]
    assert {split: len(arrays["labels"]) for split, arrays in data.splits.items()} == {"train": 18, "val": 2, "test": 3}
    for arrays in data.splits.values():
        for image, label in zip(arrays["images"], arrays["labels"], strict=True):
            bright = image[0 if label else 2]
            assert bright.min() > 200
            assert image.sum() == bright.sum()


def test_a_validation_folder_of_images_is_used(tmp_path: Path) -> None:
    members = colours("train", red=3, blue=3) | colours("val", blue=1) | colours("test", red=1)
    data = packed_data(ImageFolders(size=8), write_tar(tmp_path / "i.tar", members))
    assert {split: arrays["labels"].tolist() for split, arrays in data.splits.items()} == {
        "train": [0, 0, 0, 1, 1, 1],
        "val": [0],
        "test": [1],
    }


def test_images_are_resized_and_grey_ones_become_rgb(tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    Image.new("L", (5, 9), 100).save(grey)
    members = colours("train", red=2, blue=2) | {
        "mine/test/red/wide.png": plain_png(RED, (40, 10)),
        "mine/test/red/grey.PNG": grey.read_bytes(),
    }
    data = packed_data(ImageFolders(size=16), write_tar(tmp_path / "i.tar", members))
    assert data.splits["train"]["images"].shape == (2, 3, 16, 16)
    grey_image, wide = data.splits["test"]["images"]
    assert np.unique(grey_image).tolist() == [100]
    assert [np.unique(plane).tolist() for plane in wide] == [[255], [0], [0]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (colours("test", red=2), "no train/<class>/*.png in it"),
        (
            colours("train", red=2, blue=2) | colours("test", green=1),
            "test/ has the class 'green' that train/ lacks; train/ has blue, red",
        ),
    ],
)
def test_inconsistent_class_folders_are_refused(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    assert message in refusal(ImageFolders(size=8), write_tar(tmp_path / "i.tar", members))


def pixels(tmp_path: Path, content: bytes, suffix: str = "png", **options: Any) -> list[Any]:
    """The top left and bottom right pixel of an image as it is packed."""
    members = colours("train", red=2, blue=2) | {f"mine/test/red/0.{suffix}": content}
    (image,) = packed_data(ImageFolders(size=8, **options), write_tar(tmp_path / "i.tar", members)).splits["test"][
        "images"
    ]
    return [image[:, 0, 0].tolist(), image[:, -1, -1].tolist()]


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("orientation", "transposed"), [(3, "ROTATE_180"), (6, "ROTATE_90"), (5, "TRANSPOSE")])
def test_an_image_is_rotated_as_its_exif_data_say(orientation: int, transposed: str, tmp_path: Path) -> None:
    """As a phone stores it: turned, with a note of how to turn it back."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(upright).transpose(Image.Transpose[transposed])
    top, bottom = pixels(tmp_path, encoded(stored, "JPEG", exif=exif, quality=95), "jpg")
    assert min(top) > 250 and max(bottom) < 5


def test_grey_of_16_bits_is_scaled_to_8(tmp_path: Path) -> None:
    values = np.full((8, 8), 0x3FFF, np.uint16)
    values[4:] = 0xC000
    assert pixels(tmp_path, encoded(Image.fromarray(values))) == [[64] * 3, [191] * 3]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_the_background(mode: str, tmp_path: Path) -> None:
    values = np.zeros((8, 8, 4), np.uint8)
    values[4:] = (90, 90, 90, 255)  # the upper half hides black behind full transparency
    content = encoded(Image.fromarray(values).convert(mode))
    assert pixels(tmp_path, content) == [[255] * 3, [90] * 3]
    assert pixels(tmp_path, content, background="#102030") == [[16, 32, 48], [90] * 3]


def test_a_cmyk_image_and_the_first_frame_of_an_animation_are_read(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), RED)
    top, _ = pixels(tmp_path, encoded(red.convert("CMYK"), "JPEG", quality=95), "jpg")
    assert top[0] > 250 and max(top[1:]) < 5
    animation = encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])
    assert pixels(tmp_path, animation, "gif")[0] == [255, 0, 0]


def test_what_is_not_used_is_counted_with_the_reason(tmp_path: Path) -> None:
    members = colours("train", red=2, blue=2) | colours("test", red=1)
    odd = {
        "mine/README.md": "outside train/, val/ and test/",
        "mine/train/.ipynb_checkpoints/0.png": "hidden",
        "mine/train/red/notes.txt": "of another kind",
        "mine/train/blue/more/0.png": "too deep",
        "mine/train/0.png": "in no class folder",
    }
    data = packed_data(
        ImageFolders(size=8), write_tar(tmp_path / "i.tar", members | dict.fromkeys(odd, plain_png(RED)))
    )
    assert data.meta["classes"] == ["blue", "red"]
    assert data.unused == dict.fromkeys(odd.values(), 1)


@pytest.mark.parametrize(
    ("name", "facts"), [("0.tif", "1 of another kind"), ("sub/0.png", "1 too deep"), ("", "empty")]
)
def test_a_class_without_an_image_is_refused(name: str, facts: str, tmp_path: Path) -> None:
    for path, content in (colours("train", red=2, blue=2) | colours("test", red=1)).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    lost = tmp_path / "mine" / "train" / "lost" / name
    (lost.parent if name else lost).mkdir(parents=True)
    if name:
        lost.write_bytes(plain_png(RED))
    adopt(str(tmp_path / "mine"), tmp_path / "i.tar", sha256=None, partial_dir=tmp_path)
    message = refusal(ImageFolders(size=8), tmp_path / "i.tar")
    assert f"classes without an example: mine/train/lost ({facts})" in message


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_the_validation_split_may_have_another_name(name: str, tmp_path: Path) -> None:
    members = colours("train", red=3, blue=3) | colours(name, blue=1) | colours("test", red=1)
    data = packed_data(ImageFolders(size=8), write_tar(tmp_path / "i.tar", members))
    assert {split: len(arrays["labels"]) for split, arrays in data.splits.items()} == {"train": 6, "val": 1, "test": 1}
    texts = {f"{path[:-4]}.txt": b"some words" for path in members}
    data = ReviewFolders().pack(write_tar(tmp_path / "t.tar", texts))
    assert {split: len(arrays["labels"]) for split, arrays in data.splits.items()} == {"train": 6, "val": 1, "test": 1}


def test_two_validation_splits_are_refused(tmp_path: Path) -> None:
    members = colours("train", red=3, blue=3) | colours("val", blue=1) | colours("dev", red=1) | colours("test", red=1)
    message = refusal(ImageFolders(size=8), write_tar(tmp_path / "i.tar", members))
    assert "both val/ and dev/ are the val split: keep one" in message


# --- reviews ----------------------------------------------------------------------------------------------------------


def reviews(**more: str | bytes) -> dict[str, bytes]:
    """Ten reviews per class and split, of three words, one unique to it; `more` adds files to train/pos."""
    members = {
        f"aclImdb/{split}/{label}/{i}_{rating}.txt": f"common common {split}{label}{i}".encode()
        for split in ("train", "test")
        for label, rating in (("neg", 1), ("pos", 10))
        for i in range(10)
    }
    extra = {f"aclImdb/train/pos/{name}.txt": v.encode() if isinstance(v, str) else v for name, v in more.items()}
    return members | {"aclImdb/train/unsup/0_0.txt": b"unlabelled words", "aclImdb/README": b"x"} | extra


def texts_of(data: Packed, split: str) -> list[list[str]]:
    """The texts of a split, token by token."""
    arrays, vocabulary = data.splits[split], data.meta["vocabulary"]
    tokens = [vocabulary[i] for i in arrays["tokens"]]
    return [tokens[a:b] for a, b in zip(arrays["offsets"], arrays["offsets"][1:], strict=False)]


def test_reviews_keep_their_labels_lengths_and_order(tmp_path: Path) -> None:
    data = ReviewFolders().pack(write_tar(tmp_path / "r.tar", reviews()))
    assert data.meta["classes"] == ["neg", "pos"]
    assert {split: np.bincount(arrays["labels"]).tolist() for split, arrays in data.splits.items()} == {
        "train": [9, 9],
        "val": [1, 1],
        "test": [10, 10],
    }
    for split, arrays in data.splits.items():
        assert np.diff(arrays["offsets"]).tolist() == [3] * len(arrays["labels"]), split
    for text, label in zip(texts_of(data, "train"), data.splits["train"]["labels"], strict=True):
        assert text[2].startswith("trainpos" if label else "trainneg")


def test_texts_may_have_any_number_of_classes(tmp_path: Path) -> None:
    names = [f"{split}/{label}/{i}.txt" for split in ("train", "test") for label in "cab" for i in range(2)]
    members = {name: f"{name.split('/')[1]} word".encode() for name in names}
    data = ReviewFolders().pack(write_tar(tmp_path / "r.tar", members))
    assert data.meta["classes"] == ["a", "b", "c"]
    for text, label in zip(texts_of(data, "test"), data.splits["test"]["labels"], strict=True):
        assert text == ["abc"[label], "word"]


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path: Path) -> None:
    data = ReviewFolders(val_fraction=0.01).pack(
        write_tar(tmp_path / "r.tar", reviews(**{str(i): b"\xef\xbb\xbfFirst word" for i in range(2)}))
    )
    assert ["first", "word"] in texts_of(data, "train")


def test_a_word_that_train_lacks_is_unknown_in_val_and_test(tmp_path: Path) -> None:
    data = ReviewFolders().pack(write_tar(tmp_path / "r.tar", reviews()))
    assert data.meta["vocabulary"][:3] == ["<unk>", "<pad>", "common"]
    assert sorted(data.meta["vocabulary"][3:]) == sorted(text[2] for text in texts_of(data, "train"))
    for split in ("val", "test"):
        assert {tuple(text) for text in texts_of(data, split)} == {("common", "common", "<unk>")}


def test_the_vocabulary_holds_the_most_frequent_words(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "r.tar", reviews(a="b b b", b="b b b", c="b c c c c c c c"))
    data = ReviewFolders(vocabulary=2, val_fraction=0.01).pack(archive)
    assert data.meta["vocabulary"] == ["<unk>", "<pad>", "common", "b"]
    assert sum("<unk>" in text for text in texts_of(data, "train")) >= 18


def test_line_breaks_are_removed_and_separate_words(tmp_path: Path) -> None:
    data = ReviewFolders(val_fraction=0.01).pack(
        write_tar(tmp_path / "r.tar", reviews(**{str(i): "One<br />two<BR>three<br/><br >Four." for i in range(2)}))
    )
    assert ["one", "two", "three", "four", "."] in texts_of(data, "train")
    assert not [token for token in data.meta["vocabulary"][2:] if "br" in token or "<" in token]


def test_a_review_without_words_becomes_one_unknown_word(tmp_path: Path) -> None:
    members = reviews() | {"aclImdb/test/pos/0_10.txt": b"<br /><br />"}
    data = ReviewFolders().pack(write_tar(tmp_path / "r.tar", members))
    assert len(data.splits["test"]["labels"]) == 20
    assert texts_of(data, "test").count(["<unk>"]) == 1


def test_equal_reviews_in_train_and_test_are_reported(tmp_path: Path) -> None:
    members = reviews() | {
        "aclImdb/test/pos/0_10.txt": b"Equal reviews!",
        "aclImdb/train/pos/0_10.txt": b"equal  reviews !",
    }
    duplicates = ReviewFolders(val_fraction=0.01).pack(write_tar(tmp_path / "r.tar", members)).meta["duplicates"]
    assert duplicates["train/test"] + duplicates["val/test"] == 1


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair(left: tuple[int, int, int], right: tuple[int, int, int], size: int = 16) -> bytes:
    halves = [np.full((size, size, 3), colour, np.uint8) for colour in (left, right)]
    return png(np.concatenate(halves, axis=1))


def pairs(**counts: int) -> dict[str, bytes]:
    """`counts` numbered pairs per split: A red, of brightness 100 + number, and B blue."""
    return {
        f"facades/{split}/{i}.png": pair((100 + i, 0, 0), (0, 0, 200))
        for split, count in counts.items()
        for i in range(1, count + 1)
    }


@pytest.mark.parametrize(("direction", "red"), [("AtoB", "input"), ("BtoA", "target")])
def test_the_direction_decides_which_half_is_the_input(direction: Any, red: str, tmp_path: Path) -> None:
    data = packed_data(
        PairedImages(direction=direction, size=8), write_tar(tmp_path / "p.tar", pairs(train=2, val=1, test=1))
    )
    blue = {"input": "target", "target": "input"}[red]
    for arrays in data.splits.values():
        assert arrays[red].shape[1:] == arrays[blue].shape[1:] == (3, 8, 8)
        assert (arrays[red][:, 0] > 100).all()
        assert (arrays[red][:, 2] == 0).all()
        assert (arrays[blue][:, 2] == 200).all()
        assert (arrays[blue][:, 0] == 0).all()
    assert (data.meta["shape"], data.meta["direction"]) == ([3, 8, 8], direction)


def test_pairs_are_sorted_by_number(tmp_path: Path) -> None:
    members = dict(sorted(pairs(train=12, val=1, test=1).items()))  # 1, 10, 11, 12, 2
    data = packed_data(PairedImages(size=16), write_tar(tmp_path / "p.tar", members))
    assert data.splits["train"]["input"][:, 0, 0, 0].tolist() == list(range(101, 113))


def test_a_missing_validation_split_of_pairs_is_drawn_from_train(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "p.tar", pairs(train=10, test=2))

    def shades(seed: int) -> dict[str, list[int]]:
        """The brightness of the pairs of every split."""
        data = packed_data(PairedImages(size=16, val_fraction=0.3, split_seed=seed), archive)
        return {split: arrays["input"][:, 0, 0, 0].tolist() for split, arrays in data.splits.items()}

    splits = shades(0)
    assert len(splits["val"]) == 3
    assert sorted(splits["train"] + splits["val"]) == list(range(101, 111))
    assert splits == shades(0)
    assert any(shades(seed)["val"] != splits["val"] for seed in (1, 2))


@pytest.mark.parametrize(
    ("members", "message"), [(pairs(train=2), "no test/*.jpg in it"), (pairs(test=2), "no train/*.jpg in it")]
)
def test_pairs_without_train_or_test_are_refused(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    assert message in refusal(PairedImages(size=8), write_tar(tmp_path / "p.tar", members))
