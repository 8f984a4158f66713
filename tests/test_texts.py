"""Texts in folders and in tables: how they are read, assigned to splits, tokenized and refused."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from src.common.paths import ROOT
from src.configuration.schema import TextColumns
from src.data import subwords, tokens
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.kinds.text import tokenize
from src.data.packed import Packed
from src.data.sets.imdb import ReviewFolders
from src.data.sets.text_tables import TextTables
from src.data.table_archives import split_of
from src.data.tokens import BREAK, basic_english
from tests.tiny_data import write_tar


def texts_of(data: Packed, split: str) -> list[str]:
    """The texts of a split as their tokens say."""
    arrays: Any = data.splits[split]
    meta = data.meta
    offsets = arrays["offsets"].tolist()
    parts = [arrays["tokens"][a:b].tolist() for a, b in pairwise(offsets)]
    if meta["tokenizer"]["name"] == subwords.NAME:
        return [subwords.decode(ids, meta["tokenizer"]).strip() for ids in parts]
    return [" ".join(meta["vocabulary"][i] for i in ids) for ids in parts]


def labels_of(data: Packed, split: str) -> list[str]:
    labels: Any = data.splits[split]["labels"]
    return [data.meta["classes"][label] for label in labels]


FRAME = pd.DataFrame(
    {
        "id": range(60),
        "body": [f"text number {i}, of {'abc'[i % 3]}" for i in range(60)],
        "topic": [["art", "biology", "chess"][i % 3] for i in range(60)],
        "part": ["train"] * 40 + ["dev"] * 8 + ["test"] * 12,
        "author": [f"author {i // 4}" for i in range(60)],
    }
)
COLUMNS = TextColumns(text="body", label="topic", split="part")


def files(form: str, **frames: pd.DataFrame) -> dict[str, bytes]:
    """Table files of one format by the name of each frame."""
    write = {
        "csv": lambda frame: frame.to_csv(index=False).encode(),
        "tsv": lambda frame: frame.to_csv(index=False, sep="\t").encode("utf-16"),
        "jsonl": lambda frame: frame.to_json(orient="records", lines=True).encode(),
        "parquet": lambda frame: frame.to_parquet(),
    }
    return {f"{name.replace('_', '-')}.{form}": write[form](frame) for name, frame in frames.items()}


def pack(folder: Path, members: dict[str, bytes], **options: Any) -> Packed:
    return TextTables(**options).pack(write_tar(folder / "t.tar", members))


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_with_a_column_of_splits_is_read_from_every_format(form: str, tmp_path: Path) -> None:
    data = pack(tmp_path, files(form, everything=FRAME), columns=COLUMNS)
    assert data.meta["classes"] == ["art", "biology", "chess"]
    for split, rows in (("train", FRAME[:40]), ("val", FRAME[40:48]), ("test", FRAME[48:])):
        assert labels_of(data, split) == rows["topic"].tolist()
        assert len(texts_of(data, split)) == len(rows)
    assert texts_of(data, "train")[1] == "text number 1 , of b"


def test_files_named_after_splits_make_them_up_in_parts(tmp_path: Path) -> None:
    members = files("parquet", train_00000_of_00002=FRAME[:20], train_00001_of_00002=FRAME[20:40], test=FRAME[40:])
    data = pack(
        tmp_path, members | files("csv", sample_submission=FRAME[:1]), columns=TextColumns(text="body", label="topic")
    )
    assert Counter(labels_of(data, "test")) == Counter(FRAME["topic"][40:])
    assert len(data.splits["train"]["labels"]) + len(data.splits["val"]["labels"]) == 40
    assert data.unused == {"named after no split": 1}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a/train.csv", "train"),
        ("test-00000-of-00002.parquet", "test"),
        ("imdb_dev2.tsv", "val"),
        ("validation/0.jsonl", "val"),
        ("train/contest.csv", "train"),
        ("test_data/reviews.csv", ""),
        ("everything.csv", ""),
        ("train_test.csv", ""),
    ],
)
def test_the_name_of_a_file_tells_its_split(name: str, split: str) -> None:
    assert split_of(name) == split


def test_names_without_a_file_of_train_s_tell_no_splits(tmp_path: Path) -> None:
    data = pack(tmp_path, files("csv", crash_test=FRAME), columns=TextColumns(text="body", label="topic"))
    assert {split: len(arrays["labels"]) for split, arrays in data.splits.items()} == {
        "train": 42,
        "val": 6,
        "test": 12,
    }


def test_a_table_file_needs_no_archive_around_it(tmp_path: Path) -> None:
    for form in ("csv", "jsonl", "parquet"):
        (content,) = files(form, t=FRAME).values()
        (tmp_path / "table.tar").write_bytes(content)
        data = TextTables(columns=COLUMNS).pack(tmp_path / "table.tar")
        assert labels_of(data, "test") == FRAME["topic"][48:].tolist()


def test_rows_without_a_split_are_drawn_and_groups_stay_together(tmp_path: Path) -> None:
    columns = TextColumns(text="body", label="topic", group="author")
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    data = pack(tmp_path, files("csv", everything=FRAME), columns=columns, tokenizer="bpe", **fractions)
    authors = [
        {FRAME["author"][int(text.split()[2].rstrip(","))] for text in texts_of(data, split)} for split in data.splits
    ]
    assert len(data.splits["test"]["labels"]) == pytest.approx(12, abs=4)
    assert sum(map(len, authors)) == len(set.union(*authors)) == 15


def test_columns_of_a_file_without_a_header_are_numbers_and_texts_may_be_joined(tmp_path: Path) -> None:
    content = "".join(f'"{1 + i % 2}","Title {i}","Text {i}"\n' for i in range(40)).encode()
    columns = TextColumns(text=[1, 2], label=0)
    data = pack(tmp_path, {"train.csv": content, "test.csv": content}, columns=columns)
    assert data.meta["classes"] == ["1", "2"]
    assert texts_of(data, "test")[3] == "title 3 text 3"


BAD = pd.DataFrame({"text": ["good", "fine", None, " ", "bad", "poor"] * 4, "label": [*"ppppn", None] * 4})


def test_texts_that_cannot_be_used_are_refused_with_their_place_or_skipped(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"train\.jsonl, line 3 has no text: correct or remove it, or give on_bad"):
        pack(tmp_path, files("jsonl", train=BAD, test=BAD))
    data = pack(tmp_path, files("jsonl", train=BAD, test=BAD), on_bad="skip")
    assert Counter(labels_of(data, "test")) == {"p": 8, "n": 4}
    assert len(data.bad) == 24
    assert data.bad[0] == ("train.jsonl:3", "has no text")
    assert data.facts["test"] == {"name": ["test.jsonl"] * 12, "line": [n for n in range(1, 25) if n % 6 in (1, 2, 5)]}
    lines = [json.dumps({"text": text, "label": "a"}) for text in ("fine", "half \ud83d", 3)]
    with pytest.raises(SourceError, match="line 2 holds half a character"):
        pack(tmp_path, {"train.jsonl": "\n".join(lines).encode()})
    with pytest.raises(SourceError, match="line 2 holds 3 in place of a text"):
        pack(tmp_path, {"train.jsonl": "\n".join(lines[::2]).encode()})


@pytest.mark.parametrize(
    ("members", "columns", "message"),
    [
        (files("csv", train=FRAME), TextColumns(), "train.csv has no column 'label': it has 'id', 'body', "),
        (
            files("csv", train=FRAME),
            TextColumns(label="topic"),
            "train.csv has no column 'text': it has 'id', 'body', ",
        ),
        ({"train.txt": b"x"}, TextColumns(), "no table in it: give files that end in .csv, .tsv, .jsonl, .parquet"),
        (
            files("csv", a=FRAME[["body"]].assign(topic="x")),
            TextColumns(text="body", label="topic"),
            "only the class 'x'",
        ),
        (
            files("csv", a=FRAME),
            TextColumns(text="body", label="topic", split="id"),
            "line 2: '0' is no split: write one of",
        ),
        (
            files("csv", train=FRAME[FRAME["topic"] != "art"], test=FRAME),
            TextColumns(text="body", label="topic"),
            "test has the class 'art' that train lacks; train has biology, chess",
        ),
    ],
)
def test_tables_that_lack_something_are_refused(
    members: dict[str, bytes], columns: TextColumns, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as error:
        pack(tmp_path, members, columns=columns)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def folders(encoding: str = "utf-8", **more: bytes) -> dict[str, bytes]:
    """Class folders of texts, two of each class and split; `more` adds files to train/a."""
    names = [f"t/{split}/{label}/{i}.txt" for split in ("train", "test") for label in "ab" for i in range(3)]
    members = {name: f"Größe {name[2:-4]}".encode(encoding) for name in names}
    return members | {f"t/train/a/{name}.txt": content for name, content in more.items()}


@pytest.mark.parametrize(("encoding", "key"), [("utf-16", None), ("utf-8-sig", None), ("latin-1", "latin-1")])
def test_texts_in_folders_may_have_another_encoding(encoding: str, key: str | None, tmp_path: Path) -> None:
    data = ReviewFolders(encoding=key).pack(write_tar(tmp_path / "t.tar", folders(encoding)))
    assert data.meta["vocabulary"][2] == "größe"


def test_a_file_that_is_no_text_is_refused_by_name_or_skipped(tmp_path: Path) -> None:
    members = folders(latin="Größe".encode("latin-1"))
    with pytest.raises(SourceError, match=r"t/train/a/latin\.txt is not UTF-8 \(byte 2: 0xf6\): give its encoding"):
        ReviewFolders().pack(write_tar(tmp_path / "t.tar", members))
    archive = write_tar(tmp_path / "t.tar", members | {"t/train/a/empty.txt": b" \n"})
    data = ReviewFolders(on_bad="skip").pack(archive)
    assert dict(data.bad).keys() == {"t/train/a/latin.txt", "t/train/a/empty.txt"}
    assert len(data.splits["train"]["labels"]) + len(data.splits["val"]["labels"]) == 6


def test_class_folders_alone_are_divided_class_by_class(tmp_path: Path) -> None:
    members = {f"t/{label}/{i}.txt": f"text {i} of {label}".encode() for label in "ab" for i in range(20)}
    data = ReviewFolders(test_fraction=0.25, val_fraction=0.2).pack(write_tar(tmp_path / "t.tar", members))
    counts = {split: Counter(labels_of(data, split)) for split in data.splits}
    assert counts == {"train": {"a": 12, "b": 12}, "val": {"a": 3, "b": 3}, "test": {"a": 5, "b": 5}}


def test_subwords_learned_from_the_training_part_replace_words(tmp_path: Path) -> None:
    data = pack(tmp_path, files("csv", t=FRAME), columns=COLUMNS, tokenizer="bpe", vocabulary=300)
    settings = data.meta["tokenizer"]
    assert 258 < len(data.meta["vocabulary"]) <= 300
    assert data.meta["vocabulary"][:2] == ["<unk>", "<pad>"]
    assert (settings["unknown"], settings["padding"]) == (0, 1)
    assert "Ġnumber" in data.meta["vocabulary"]
    assert texts_of(data, "test") == [text.lower() for text in FRAME["body"][48:]]
    unseen = "日本 naïve <br/>Ünseen"
    (ids,) = subwords.encode([unseen], settings)
    assert subwords.decode(ids, settings).split() == ["日本", "naïve", "ünseen"]


TRAINING = """
import hashlib, random, sys
from pathlib import Path
from src.data import subwords
texts = Path(sys.argv[1]).read_text().split("\\0")
random.Random(sys.argv[2]).shuffle(texts)
print(hashlib.sha256(subwords.train(texts, 3000)["json"].encode()).hexdigest())
"""


def test_a_tokenizer_has_the_same_bits_with_any_number_of_threads_and_order_of_texts(tmp_path: Path) -> None:
    from src.data.samples.reviews import draw

    draw(tmp_path / "real.tar.gz", train=300, test=10)
    real = [content.decode() for _, content in read_archive(tmp_path / "real.tar.gz")]
    (tmp_path / "texts").write_text("\0".join(real))
    digests = {
        subprocess.run(
            [sys.executable, "-c", TRAINING, str(tmp_path / "texts"), threads],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(digests) == 1
    assert len(digests.pop()) == 65


def odd_texts() -> Iterable[str]:
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
    generator = random.Random(0)
    for _ in range(300):
        yield "".join(generator.choices(alphabet, k=60))


def test_the_exported_tokenizer_equals_the_one_of_training(tmp_path: Path) -> None:
    from torchtext.data.utils import get_tokenizer

    from src.data.samples.reviews import draw

    draw(tmp_path / "real.tar.gz", train=100, test=10)
    real = [content.decode() for _, content in read_archive(tmp_path / "real.tar.gz")]
    assert any("<br" in text for text in real)
    tokenizer, settings = get_tokenizer("basic_english"), basic_english()
    for text in [*real, *odd_texts()]:
        assert tokenize(text, settings) == tokenizer(BREAK.sub(" ", text)), repr(text)


def test_chunks_tokenized_by_several_processes_come_back_in_order(tmp_path: Path) -> None:
    texts = [f"Review {i}, <br />{'very ' * (i % 7)}good." for i in range(60)]
    splits = np.array(["train", "test", "test"] * 20)
    words = tokens.Words(20)
    parts = tokens.encode(words, (texts[i : i + 7] for i in range(0, 60, 7)), splits, tmp_path)
    ids = {split: part.arrays() for split, part in parts.items()}
    vocabulary = words.finish({split: arrays[0] for split, arrays in ids.items()})
    counts = Counter(word for text in tokens.tokenize(texts[::3]) for word in text)
    assert sorted(counts[word] for word in vocabulary[2:]) == sorted(sorted(counts.values())[-20:])
    for split, rows in (("train", texts[::3]), ("test", [t for i, t in enumerate(texts) if i % 3])):
        tokens_, offsets = ids[split]
        found = [[vocabulary[i] for i in tokens_[a:b]] for a, b in pairwise(offsets)]
        expected = [[word if word in vocabulary else "<unk>" for word in text] for text in tokens.tokenize(rows)]
        assert found == expected
