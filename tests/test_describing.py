"""The data report: what is measured, what is a duplicate, what is warned of, and the page."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import save_file

from src.common.files import sha256_of
from src.common.paths import ROOT
from src.common.tag_schemes import Span, tags_of
from src.configuration.composing import compose_data_set, write_resolved
from src.configuration.schema import DataConfig, plain
from src.data import preparing
from src.data.packed import PADDING, UNKNOWN, PackedError, read_meta
from src.describe import main_with_words
from src.describing import Examined, duplicates, joined, load, page, pixels, reference, report, stored
from src.describing.drift import CHI_SQUARED, KOLMOGOROV, compare, largest_gap, may_differ
from src.describing.kinds import plain as plain_kind
from src.describing.kinds import text as texts
from src.tracking.run_facts import data_report
from tests.tiny_data import cifar_members, noise_digits, write_tar

Arrays = dict[str, np.ndarray]
NOISE = np.random.default_rng(0)


def packed(folder: Path, splits: Mapping[str, Arrays], meta: dict[str, Any], **origin: Any) -> Path:
    """A packed data set of these arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {}
    for split, arrays in splits.items():
        save_file(arrays, folder / f"{split}.safetensors")
        facts[split] = {"sha256": sha256_of(folder / f"{split}.safetensors"), "examples": 1}
    (folder / "meta.json").write_text(json.dumps(meta | {"splits": facts}))
    source = {"origin": "mine.tar", "sha256": "0" * 64}
    (folder / "origin.json").write_text(json.dumps({"config": {}, "source": source, **origin}))
    return folder


def scenes(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth coloured pictures with structure, uint8 [count, 3, size, size]."""
    random = np.random.default_rng(seed)
    small = Image.fromarray
    pictures = [
        np.asarray(small(random.integers(0, 256, (6, 6, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC))
        for _ in range(count)
    ]
    return np.stack(pictures).transpose(0, 3, 1, 2).copy()


def images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), **origin: Any) -> Path:
    """30, 10 and 20 pictures of the classes in turn."""
    splits = {
        split: {"images": scenes(count, seed=seed), "labels": np.arange(count) % len(classes)}
        for seed, (split, count) in enumerate({"train": 30, "val": 10, "test": 20}.items())
    }
    return packed(folder, splits, {"kind": "images", "classes": list(classes), "shape": [3, 32, 32]}, **origin)


def measured(folder: Path, array: np.ndarray) -> pixels.Measured:
    folder = packed(folder, {"train": {"images": array}}, {})
    meta = json.loads((folder / "meta.json").read_text())
    return pixels.measure(stored.StoredSplit(folder, "train", meta)["images"])


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_stored_split_gives_what_was_packed_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"images": scenes(7), "labels": np.arange(7), "empty": np.zeros((0, 4), np.float32)}
    folder = packed(tmp_path, {"train": arrays}, {})
    split = stored.StoredSplit(folder, "train", json.loads((folder / "meta.json").read_text()))
    monkeypatch.setattr(stored, "PIECE", 2 * 3 * 32 * 32)
    pieces = list(split["images"].pieces())
    assert [len(piece) for piece in pieces] == [2, 2, 2, 1]
    assert np.array_equal(np.concatenate(pieces), arrays["images"])
    assert np.array_equal(split["images"][np.array([5, 0])], arrays["images"][[5, 0]])
    assert split["empty"][:].shape == (0, 4)


def test_a_damaged_split_is_refused(tmp_path: Path) -> None:
    folder = images(tmp_path)
    (folder / "test.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(PackedError, match=r"test\.safetensors is damaged: delete .* and run `dvc repro`"):
        report.build(folder, "mine", "full")


# --- images -----------------------------------------------------------------------------------------------------------


def test_brightness_and_contrast_are_those_of_the_grey_levels_and_channels(tmp_path: Path) -> None:
    flat = np.broadcast_to(np.array([200, 100, 50], np.uint8)[:, None, None], (3, 8, 8))
    halves = np.zeros((3, 8, 8), np.uint8)
    halves[:, :, 4:] = 255
    features = measured(tmp_path, np.stack([flat, halves])).features
    assert features["brightness"] == pytest.approx([0.299 * 200 + 0.587 * 100 + 0.114 * 50, 127.5], rel=1e-5)
    assert features["contrast"] == pytest.approx([0, 127.5], abs=0.02)
    assert features["red"] == pytest.approx([200, 127.5])
    assert features["blue contrast"] == pytest.approx([0, 127.5], abs=0.02)
    assert features["sharpness"][0] == pytest.approx(0, abs=0.02)
    # Two columns of six have a Laplacian, of 255 and -255.
    assert features["sharpness"][1] == pytest.approx(255 * (2 / 6) ** 0.5, rel=1e-4)


def test_a_hash_survives_what_keeps_the_scene_and_tells_scenes_apart() -> None:
    pictures = scenes(40, size=64)
    changed = []
    for picture in pictures.transpose(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray((picture * 0.8).astype(np.uint8)).resize((48, 48)).save(file, "JPEG", quality=60)
        changed.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    first, second = (pixels.hashes(pixels._grey(np.stack(p))) for p in (list(pictures), changed))
    distances = np.bitwise_count(first[:, None] ^ second[None])
    assert (distances.diagonal() <= duplicates.DISTANCE).mean() >= 0.95
    assert distances[~np.eye(40, dtype=bool)].min() > duplicates.DISTANCE


def test_candidates_are_all_pairs_of_near_hashes() -> None:
    random = np.random.default_rng(3)
    hashes = random.integers(0, 2**64, 600, np.uint64)
    for place in range(0, 300, 2):  # with 0 to 9 other bits
        flips = random.choice(64, (place // 2) % 10, replace=False)
        hashes[place + 1] = hashes[place] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
    pairs = duplicates.candidates(hashes)
    near = {
        (a, b) for a, b in combinations(range(600), 2) if (hashes[a] ^ hashes[b]).bit_count() <= duplicates.DISTANCE
    }
    assert len(near) >= 100
    assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == near


def test_duplicates_and_answers_that_disagree_are_counted(tmp_path: Path) -> None:
    train, test = scenes(20, seed=1), scenes(12, seed=2)
    train[1] = train[0]  # equal, the same label
    train[3] = train[2]  # equal, another label
    test[0] = train[5]
    test[1] = (train[6] * 0.9).astype(np.uint8)  # the same scene, darker
    labels = np.zeros(20, np.int64)
    labels[3] = 1
    splits = {
        "train": {"images": train, "labels": labels},
        "val": {"images": scenes(4, seed=3), "labels": np.arange(4) % 2},
        "test": {"images": test, "labels": np.arange(12) % 2},
    }
    built = report.build(packed(tmp_path, splits, {"kind": "images", "classes": ["cat", "dog"]}), "mine", "full")
    assert built.duplicates.equal == {
        "train": 2, "train/val": 0, "train/test": 1, "val": 0, "val/test": 0, "test": 0
    }  # fmt: skip
    assert built.duplicates.near == {"train": 0, "train/val": 0, "train/test": 1, "val": 0, "val/test": 0, "test": 0}
    assert built.duplicates.disagreeing == 1
    assert [pair.names for pair in built.pairs] == [("train, row 6", "test, row 1")]
    assert built.warnings[:3] == [
        "1 test image is equal to train images; remove them from train, or figures on test are too good",
        "1 test image is a near-duplicate of train images; remove them from train, or figures on test are too good",
        "1 group of equal images with different answers; correct or remove them",
    ]


def test_facts_of_the_files_are_features_and_name_the_pairs(tmp_path: Path) -> None:
    folder = images(tmp_path)
    train, test = scenes(30, seed=0), scenes(20, seed=2)
    test[4] = (train[7] * 0.95).astype(np.uint8)
    for split, array in (("train", train), ("test", test)):
        save_file({"images": array, "labels": np.arange(len(array)) % 2}, folder / f"{split}.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "test"):
        meta["splits"][split]["sha256"] = sha256_of(folder / f"{split}.safetensors")
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = [
        (s, "images", i, f"{s}/{i}.png", 100 + i, "L" if i < 3 else "RGB") for s, n in SIZES.items() for i in range(n)
    ]
    columns = dict(
        zip(("split", "array", "row", "name", "width", "mode"), map(list, zip(*rows, strict=True)), strict=True)
    )
    parquet.write_table(pyarrow.table(columns), folder / report.FACTS)
    built = report.build(folder, "mine", "full")
    assert built.splits["train"].categories["mode"] == {"L": 3, "RGB": 27}
    assert built.splits["val"].numbers["width"].tolist() == list(range(100, 110))
    assert built.pairs[0].names == ("train: train/7.png", "test: test/4.png")


SIZES = {"train": 30, "val": 10, "test": 20}


# --- other kinds ------------------------------------------------------------------------------------------------------

WORDS = [UNKNOWN, PADDING, "good", "bad", "film"]


def text_arrays(*examples: tuple[list[int], int]) -> Arrays:
    return {
        "tokens": np.array([token for tokens, _ in examples for token in tokens], np.int32),
        "offsets": np.cumsum([0, *(len(tokens) for tokens, _ in examples)]),
        "labels": np.array([label for _, label in examples]),
    }


def text_set(folder: Path) -> Path:
    splits = {
        "train": text_arrays(([2, 4, 2], 1), ([3, 4], 0), ([2, 4, 2], 0)),
        "val": text_arrays(([2], 1)),
        "test": text_arrays(([0, 0, 4, 0], 0), ([3, 4], 1)),
    }
    meta = {"kind": "text", "classes": ["neg", "pos"], "vocabulary": WORDS, "tokenizer": {"name": "basic_english"}}
    return packed(folder, splits, meta)


@pytest.mark.parametrize("tokens", [2, 1000])
def test_texts_are_counted_token_by_token(tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "TOKENS", tokens)
    built = report.build(text_set(tmp_path), "mine", "full")
    train, test = built.splits["train"], built.splits["test"]
    assert train.numbers["length"].tolist() == [3, 2, 3]
    assert test.numbers["unknown"].tolist() == [75, 0]
    assert train.categories == {"class": {"neg": 2, "pos": 1}, "word": {"film": 3, "good": 2, "bad": 1}}
    assert train.figures["words that occur once"] == 1
    assert test.figures["unknown tokens, per cent"] == 50
    assert built.duplicates.equal["train"] == 1
    assert built.duplicates.disagreeing == 2  # the one within train, and that of train and test
    assert built.samples == {"neg": ["bad film", "good film good"], "pos": ["good film good"]}
    assert any("lacks 50.0 % of test's tokens" in line for line in built.warnings)


def test_new_texts_are_counted_in_the_vocabulary_of_the_old_ones(tmp_path: Path) -> None:
    folder = text_set(tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    other = meta | {"vocabulary": [UNKNOWN, PADDING, "film"]}
    examined = load("text").examine(stored.StoredSplit(folder, "train", meta), meta, other)
    assert examined.numbers["unknown"] == pytest.approx([200 / 3, 50, 200 / 3])
    assert examined.categories["word"] == {"film": 3}


def test_boxes_are_counted_and_measured(tmp_path: Path) -> None:
    def arrays(*numbers: int) -> Arrays:
        count = sum(numbers)
        return {
            "images": scenes(len(numbers)),
            "offsets": np.cumsum([0, *numbers]),
            "boxes": np.array([[0, 0, 16, 8], [4, 4, 8, 20], [0, 0, 32, 32]], np.float32)[:count],
            "labels": np.array([0, 1, 1])[:count],
            "crowd": np.array([0, 0, 1], np.uint8)[:count],
            "difficult": np.zeros(count, np.uint8),
        }

    splits = {"train": arrays(2, 0, 1), "val": arrays(1), "test": arrays(1)}
    meta = {"kind": "boxes", "classes": ["cat", "dog"], "shape": [3, 32, 32]}
    train = report.build(packed(tmp_path, splits, meta), "mine", "full").splits["train"]
    assert train.numbers["boxes"].tolist() == [2, 0, 1]
    assert train.numbers["box area"].tolist() == [12.5, 6.25, 100]
    assert train.numbers["box shape"].tolist() == [1, -2, 0]
    assert train.categories == {"object": {"cat": 1, "dog": 2}}
    assert train.figures["images without an object"] == 1
    assert train.figures["objects below 8 pixels a side"] == 1
    assert train.figures["crowds"] == 1


@pytest.mark.parametrize("scheme", ["iob2", "iobes"])
def test_entities_are_those_of_the_tags(scheme: Any, tmp_path: Path) -> None:
    sentences = [
        (["Ann", "Lee", "met", "Bo"], [Span(0, 2, "PER"), Span(3, 4, "PER")]),
        (["in", "New", "York"], [Span(1, 3, "LOC")]),
        (["Rome"], [Span(0, 1, "LOC")]),
    ]
    names = ["O", *(f"{prefix}-{kind}" for kind in ("LOC", "PER") for prefix in ("B", "I", "E", "S"))]
    words = [word for sentence, _ in sentences for word in sentence]
    arrays = {
        "offsets": np.array([0, 4, 7, 8]),
        "documents": np.array([0, 0, 1], np.int32),
        "words": np.arange(2, 10, dtype=np.int32),
        "tags": np.array([names.index(tag) for s, spans in sentences for tag in tags_of(spans, len(s), scheme)]),
        "text": np.frombuffer("".join(words).encode(), np.uint8),
        "text_offsets": np.cumsum([0, *map(len, words)]),
    }
    vocabulary = [UNKNOWN, PADDING, *words]
    meta = {"kind": "tagged", "classes": ["LOC", "PER"], "tags": names, "vocabulary": vocabulary}
    built = report.build(packed(tmp_path, dict.fromkeys(("train", "val", "test"), arrays), meta), "mine", "full")
    train = built.splits["train"]
    assert train.categories["entity"] == {"LOC": 2, "PER": 2}
    assert train.numbers["entities"].tolist() == [2, 1, 1]
    assert train.numbers["entity length"].tolist() == [2, 1, 2, 1]
    assert built.samples["PER"] == ["[PER: Ann Lee] met [PER: Bo]"]
    assert built.duplicates.equal["train/test"] == 3


def test_pairs_domains_and_tables_have_reports(tmp_path: Path) -> None:
    def parts(first: str, second: str) -> dict[str, Arrays]:
        return {s: {first: scenes(4, seed=i), second: scenes(4, seed=i + 9)} for i, s in enumerate(SIZES)}

    pairs = parts("input", "target")
    pairs["train"]["input"][1] = pairs["train"]["input"][0]  # with another target
    built = report.build(packed(tmp_path / "pairs", pairs, {"kind": "pairs"}), "mine", "full")
    assert (built.duplicates.equal["train"], built.duplicates.disagreeing) == (1, 1)
    domains = report.build(packed(tmp_path / "domains", parts("a", "b"), {"kind": "unpaired"}), "mine", "full")
    assert domains.classes == {"a": dict.fromkeys(SIZES, 4), "b": dict.fromkeys(SIZES, 4)}
    rows = {s: {"rows": np.array([[0, -1], [0, 1]], np.float32)} for s in SIZES}
    meta = {"kind": "table", "columns": ["x", "y"], "mean": [7.0, 10.0], "std": [1.0, 2.0]}
    table = report.build(packed(tmp_path / "table", rows, meta), "mine", "full")
    assert table.splits["train"].numbers["y"].tolist() == [8, 12]
    assert table.samples == {"": ["7, 8", "7, 12"]}
    assert "1 columns have one value in train (x); remove them" in table.warnings


def test_each_kind_of_data_has_a_description_of_its_own() -> None:
    kinds = {path.stem for path in (ROOT / "src" / "data" / "kinds").glob("[a-z]*.py")}
    assert plain_kind.DESCRIPTION not in [load(kind) for kind in kinds]


def test_of_a_kind_without_a_description_examples_are_counted_and_duplicates_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load("graphs") is plain_kind.DESCRIPTION
    monkeypatch.setattr(report, "load", lambda _: plain_kind.DESCRIPTION)
    rows = {split: {"rows": np.array([[0, i], [2, 3], [0, i]], np.float32)} for i, split in enumerate(SIZES)}
    built = report.build(packed(tmp_path, rows, {"kind": "table"}), "mine", "full")
    assert [len(examined) for examined in built.splits.values()] == [3, 3, 3]
    assert built.duplicates.equal == {
        **dict.fromkeys(SIZES, 1),
        **dict.fromkeys(("train/val", "train/test", "val/test"), 1),
    }
    assert page.write(built, tmp_path / "report").is_file()


# --- the page and the summary -----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The tags of a page, and the addresses that it names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_page_is_one_file_without_scripts_and_the_same_each_time(tmp_path: Path) -> None:
    folder = images(tmp_path, ("<b>cat", "dog"), unused={"of another kind": 3}, bad=[["a/b.png", "is <empty>"]])
    first, second = (page.write(report.build(folder, "mine", "full"), tmp_path / name) for name in ("one", "two"))
    for name in ("report.html", "metrics.json", "classes.csv", "features.csv"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    text = first.read_text()
    parsed = Tags(text)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert all(address.startswith("data:image/") for address in parsed.addresses)
    assert "<td>&lt;b&gt;cat</td>" in text
    assert "is &lt;empty&gt;" in text
    assert str(tmp_path) not in text
    assert not re.search(r"\b20\d\d-\d\d", text)
    metrics = json.loads((first.parent / "metrics.json").read_text())
    assert metrics["examples"] == SIZES
    assert metrics["left_out"] == 4
    assert metrics["duplicates"] == {"within": 0, "between": 0}
    assert (first.parent / "classes.csv").read_text().splitlines()[:2] == ["split,class,count", "train,<b>cat,15"]


def test_a_summary_of_a_thousand_classes_and_many_columns_fits_a_terminal(tmp_path: Path) -> None:
    classes = tuple(f"a rather long name of class {number}" for number in range(1000))
    lines = list(page.summary(report.build(images(tmp_path / "i", classes), "mine", "full")))
    columns = [f"a rather long name of column {number}" for number in range(300)]
    rows = {s: {"rows": NOISE.normal(size=(50, 300)).astype(np.float32)} for s in SIZES}
    meta = {"kind": "table", "columns": columns, "mean": [0.0] * 300, "std": [1.0] * 300}
    other = list(page.summary(report.build(packed(tmp_path / "t", rows, meta), "mine", "full")))
    for text in (lines, other):
        assert len(text) <= 39
        assert max(map(len, text)) <= 100


def test_balance_and_left_out_files_are_warned_of(tmp_path: Path) -> None:
    labels = {"train": [0] * 50 + [1] * 4, "val": [0, 1], "test": [0] * 12}
    splits = {s: {"images": scenes(len(v), seed=i), "labels": np.array(v)} for i, (s, v) in enumerate(labels.items())}
    meta = {"kind": "images", "classes": ["cat", "dog"]}
    folder = packed(tmp_path, splits, meta, unused={"hidden": 9, "too deep": 2}, bad=[["x.png", "broken"]])
    assert report.build(folder, "mine", "full").warnings[:4] == [
        "1 file can't be read; replace what the page names",
        "2 files are not used (2 too deep); move or convert what belongs here",
        "test has no images of dog; add some, or these classes are not measured",
        "train has 12 times as many images of cat (50) as of dog (4); judge by F1, and collect more of rare classes",
    ]


# --- drift ------------------------------------------------------------------------------------------------------------


def sample(
    seed: int,
    shift: float = 0.0,
    shares: tuple[float, ...] = (0.5, 0.5),
    *,
    count: int = 2000,
    others: str = "abcdefgh",
) -> Examined:
    random = np.random.default_rng(seed)
    numbers = {name: random.normal(size=count).astype(np.float32) for name in others}
    numbers["moved"] = random.normal(shift, size=count).astype(np.float32)
    counts = dict(zip("xy", random.multinomial(count, shares).tolist(), strict=True))
    return Examined(np.zeros(count, np.uint64), numbers, {"class": counts})


def drifted(first: Examined, second: Examined) -> list[tuple[str, str]]:
    return [(test.feature, test.name) for test in compare(first, second) if test.is_drift]


def test_samples_of_one_distribution_have_not_drifted() -> None:
    assert [drifted(sample(seed), sample(seed + 100)) for seed in range(20)] == [[]] * 20


def test_a_moved_feature_and_other_shares_are_drift_in_that_feature() -> None:
    assert drifted(sample(0), sample(1, shift=0.5)) == [("moved", KOLMOGOROV)]
    assert drifted(sample(0), sample(1, shares=(0.7, 0.3))) == [("class", CHI_SQUARED)]
    assert may_differ(sample(0), sample(1, shift=0.5))


def test_darkened_and_blurred_images_drift_in_brightness_and_sharpness(tmp_path: Path) -> None:
    def examined(images: np.ndarray) -> Examined:
        part = measured(tmp_path, images)
        return Examined(part.digests, part.features)

    # Scenes with a fine grain, which alone is lost by blurring.
    grain = NOISE.integers(0, 40, (2, 300, 3, 32, 32))
    old, new = ((scenes(300, seed=seed) * 0.8 + grain[seed]).astype(np.uint8) for seed in (0, 1))
    blurred = np.mean([np.roll(new, shift, axis) for axis in (2, 3) for shift in (-1, 0, 1)], axis=0).astype(np.uint8)
    usual = examined(old)
    assert drifted(usual, examined(new)) == []
    assert ("brightness", KOLMOGOROV) in drifted(usual, examined((new * 0.7).astype(np.uint8)))
    assert drifted(usual, examined(blurred))[0] == ("sharpness", KOLMOGOROV)
    assert "brightness" not in dict(drifted(usual, examined(blurred)))


def test_a_difference_of_a_hair_in_a_million_rows_is_significant_and_no_drift() -> None:
    first, second = (sample(s, 0.02 * s, count=10**6, others="") for s in (0, 1))
    moved = next(test for test in compare(first, second) if test.feature == "moved")
    assert moved.p < 1e-9
    assert not moved.is_drift
    assert not may_differ(first, second)


def test_numbers_are_tested_as_scipy_tests_them() -> None:
    from scipy.stats import ks_2samp

    first, second = NOISE.integers(0, 90, 3000).astype(np.float32), NOISE.integers(5, 95, 1700).astype(np.float32)
    expected = ks_2samp(first, second, method="asymp")
    (test,) = compare(*(Examined(np.zeros(0, np.uint64), {"x": values}) for values in (first, second)))
    assert test.effect == largest_gap(first, second) == pytest.approx(expected.statistic)
    assert test.p == pytest.approx(expected.pvalue, rel=0.2)


def test_rare_values_are_tested_together() -> None:
    def examined(counts: dict[str, int]) -> Examined:
        return Examined(np.zeros(sum(counts.values()), np.uint64), {}, {"word": counts})

    (test,) = compare(
        examined({"a": 500} | {f"x{i}": 1 for i in range(50)}), examined({"a": 500} | {f"y{i}": 1 for i in range(50)})
    )
    assert test.effect == pytest.approx(0.0)
    assert test.p == pytest.approx(1.0)


def test_other_texts_drift_in_their_words_and_unknown_tokens_and_a_random_split_does_not(tmp_path: Path) -> None:
    """The new texts have a vocabulary of their own, in another order."""

    def folder(name: str, words: list[str], seed: int) -> Path:
        random = np.random.default_rng(seed)
        chances = 1 / np.arange(1, len(words) + 1)

        def arrays(count: int) -> Arrays:
            texts = [random.choice(len(words), random.integers(5, 40), p=chances / chances.sum()) for _ in range(count)]
            return text_arrays(*(((text + 2).tolist(), i % 2) for i, text in enumerate(texts)))

        meta = {"kind": "text", "classes": ["neg", "pos"], "vocabulary": [UNKNOWN, PADDING, *words]}
        return packed(tmp_path / name, {"train": arrays(800), "val": arrays(100), "test": arrays(400)}, meta)

    words = [f"word{number}" for number in range(300)]
    meta, _, old = report.examine(folder("old", words, 0))
    usual = reference(load("text"), old)
    assert [test.feature for test in compare(usual, old["test"]) if test.is_drift] == []
    for name, others, expected in (
        ("same", words, set()),
        ("rare", words[150:] + words[:150], {"word"}),
        ("other", words[:100] + [f"new{number}" for number in range(200)], {"word", "unknown"}),
    ):
        _, _, new = report.examine(folder(name, others, 1), meta)
        tests = compare(usual, joined(new.values()))
        assert {test.feature for test in tests if test.is_drift} == expected, name


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process, which writes below `tmp_path`, on a small archive of CIFAR-10's layout."""
    monkeypatch.setattr(preparing, "DIRECT", str(tmp_path / "direct"))
    monkeypatch.setattr(DataConfig, "direct_report", property(lambda config: tmp_path / "report"))
    archive = write_tar(tmp_path / "old.tar", cifar_members())

    def call(*words: str) -> int:
        return main_with_words([*words, "profile=full", f"data.archive={archive}"])

    return call


def new_archive(path: Path, factor: float) -> Path:
    """Another archive of the same layout; its pixels are multiplied."""
    members = {}
    for seed, (name, content) in enumerate(cifar_members("new").items()):
        if name.endswith(".bin"):
            records = np.frombuffer(content, np.uint8).reshape(-1, 3073).copy()
            records[:, 1:] = np.random.default_rng(90 + seed).integers(0, 256, records[:, 1:].shape) * factor
            content = records.tobytes()
        members[name] = content
    return write_tar(path, members)


def test_the_command_packs_a_data_set_and_names_its_page(
    describe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe("cifar10") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cifar10 (full): train 38, val 2, test 6 images" in lines
    assert "! test has fewer than 10 images of cat, ship; figures of these classes are chance" in lines
    assert lines[-1] == f"page: {os.path.relpath(tmp_path / 'report' / 'report.html')}"
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize(("factor", "code", "features"), [(1.0, 0, set()), (0.6, 3, {"brightness", "contrast", "red"})])
def test_the_exit_code_and_json_say_whether_new_data_have_drifted(
    factor: float, code: int, features: set[str], describe: Callable[..., int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    archive = new_archive(tmp_path / "new.tar", factor)
    assert describe(str(archive), "--against", "cifar10", "--json") == code
    tests = json.loads(capsys.readouterr().out.partition("[")[2].join(("[", "")))
    drifted_features = {test["feature"] for test in tests if test["is_drift"]}
    assert features <= drifted_features
    assert bool(features) == bool(drifted_features)
    assert "class" not in drifted_features


def test_new_data_are_compared_with_those_of_a_run(
    describe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose_data_set("cifar10", ["profile=full", f"data.archive={tmp_path / 'old.tar'}"])
    sections = {"profile": plain(config.profile), "data": plain(config.data)}
    write_resolved(tmp_path / "run" / "config.yaml", sections)
    archive = new_archive(tmp_path / "new.tar", 0.6)
    assert main_with_words([str(archive), "--against", str(tmp_path / "run")]) == 3
    assert re.search(
        r"^drift brightness +Kolmogorov-Smirnov +1\.000 .* median 12\d.* -> 7\d", capsys.readouterr().out, re.M
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifar"], "configuration refused: data=cifar: unknown; allowed: "),
        (
            ["conll2003_subwords"],
            "configuration refused: data.tokenizer: Interpolation key 'model.encoder' not found; "
            "is it a model's? Then add",
        ),
        (["cifar10", "data.val_fractio=0.2"], "configuration refused: data.val_fractio: unknown key"),
        (["nowhere", "--against", "cifar10"], "configuration refused: nowhere: no such file or folder; give new data"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: list[str], message: str, describe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.tar"]


def test_a_training_s_run_gets_the_report_of_its_own_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = noise_digits(tmp_path)
    for name in ("report", "direct_report"):
        monkeypatch.setattr(DataConfig, name, tmp_path / name)
    meta = read_meta(config.processed)
    assert data_report(config, meta) is None
    written = page.write(report.build(config.processed, "mnist", "sample"), config.direct_report)
    assert data_report(config, meta) == written
    other = {**meta, "splits": {**meta["splits"], "test": {"sha256": "0" * 64}}}
    assert data_report(config, other) is None
