"""Table files of every format and encoding, and the rule that assigns their rows to splits."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest

from src.common.errors import Failure
from src.data.packed import stratified_holdout
from src.data.splitting import assign_splits
from src.data.table_files import read_table

TEXTS = ['He said "no", twice', "two\nlines", "naïve café", "", "a,b;c\td"]
FRAME = pd.DataFrame({"text": TEXTS, "label": ["pos", "neg", "pos", "neg", "pos"]})


def parquet() -> bytes:
    buffer = io.BytesIO()
    FRAME.to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("t.csv", FRAME.to_csv(index=False).encode(), None),
        ("t.csv", FRAME.to_csv(index=False, sep=";").encode(), None),
        ("t.csv", FRAME.to_csv(index=False, lineterminator="\r\n").encode("utf-8-sig"), None),
        ("T.TSV", FRAME.to_csv(index=False, sep="\t").encode("utf-16"), None),
        ("t.csv", FRAME.to_csv(index=False).encode("utf-32"), None),
        ("t.csv", FRAME.to_csv(index=False).encode("latin-1"), "latin-1"),
        ("t.csv", FRAME.to_csv(index=False).encode("utf-8-sig"), "utf-8"),
        ("t.jsonl", FRAME.to_json(orient="records", lines=True).encode(), None),
        ("t.parquet", parquet(), None),
    ],
)
def test_a_table_is_read_alike_from_every_format(name: str, content: bytes, encoding: str | None) -> None:
    table = read_table(content, name, encoding=encoding)
    assert table.columns == ["text", "label"]
    assert table.rows == 5
    assert table.column("text") == TEXTS
    assert [list(chunk) for chunk in table.chunks("label", 2)] == [["pos", "neg"], ["pos", "neg"], ["pos"]]


def test_the_rows_of_a_long_file_keep_their_order_and_their_lines() -> None:
    rows = [(f'row "{i}"' if i % 7 else f"row\n{i}", str(i)) for i in range(25_000)]
    content = pd.DataFrame(rows, columns=["text", "number"]).to_csv(index=False)
    table = read_table(content.encode(), "t.csv")
    assert table.column("text") == [text for text, _ in rows]
    assert table.column("number") == [number for _, number in rows]
    assert table.place(0) == "t.csv, line 2"
    assert table.place(24_999) == f"t.csv, line {len(content.splitlines())}"


def test_quotation_marks_that_a_tsv_leaves_open_stand_for_themselves() -> None:
    content = b'sentence\tlabel\n"Yes\t1\n6" of "it\t0\n'
    assert read_table(content, "t.tsv").column("sentence") == ['"Yes', '6" of "it']


def test_a_json_line_may_lack_a_key_and_hold_other_types() -> None:
    lines = [{"text": "a", "label": 1}, {"text": "b", "extra": [1]}, {"label": "1", "text": "c"}]
    table = read_table("\n\n".join(map(json.dumps, lines)).encode("utf-8-sig"), "t.jsonl")
    assert {column: table.column(column) for column in ("text", "label", "extra")} == {
        "text": ["a", "b", "c"],
        "label": [1, None, "1"],
        "extra": [None, [1], None],
    }
    assert table.place(2) == "t.jsonl, line 5"


@pytest.mark.parametrize(
    ("content", "has_header", "columns"),
    [(b"1,2\n3,4\n", None, ["0", "1"]), (b"x,y\n3,4\n", None, ["x", "y"]), (b"x,y\n3,4\n", False, ["0", "1"])],
)
def test_columns_without_a_header_are_numbered(content: bytes, has_header: bool | None, columns: list[str]) -> None:
    table = read_table(content, "t.csv", has_header=has_header)
    assert table.columns == columns
    assert table.column(columns[1])[-1] == "4"


def test_a_file_in_another_than_the_named_encoding_is_refused() -> None:
    with pytest.raises(Failure, match=r"t\.csv is not ASCII \(byte 4: 0x80\): give another encoding, or convert"):
        read_table(b"a,b\n\x80,2\n", "t.csv", encoding="ascii")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv holds no row: it is empty"),
        ("t.csv", b"text,label\n", "t.csv holds no row beside its first line"),
        (
            "t.csv",
            "text,label\ncafé,1\n".encode("latin-1"),
            "t.csv is not UTF-8 (byte 14: 0xe9): give its encoding, e.g. ",
        ),
        ("t.csv", b"a" * (1 << 20) + b"\xff\n", "t.csv is not UTF-8 (byte 1048576: 0xff)"),
        ("t.csv", "text,label\nx,1\n".encode("utf-16-le"), "holds zero bytes, the first at byte 1"),
        ("t.csv", b"text,label\nx,1\ny\n", "t.csv, line 3: 1 cells where the first line has 2"),
        ("t.csv", b'text,label\n"x,1\ny,2\n', "t.csv, line 2: unexpected end of data: quote a cell"),
        ("t.csv", b"text,text\nx,1\n", "t.csv has two columns of the name 'text'"),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', "t.jsonl, line 2 is no JSON"),
        ("t.jsonl", b"[1]\n", "t.jsonl, line 1 is no object"),
        ("t.parquet", parquet()[:-9], "t.parquet is damaged or no Parquet file"),
    ],
)
def test_a_damaged_table_is_refused_with_the_place_and_the_remedy(name: str, content: bytes, message: str) -> None:
    with pytest.raises(Failure) as error:
        read_table(content, name)
    assert message in str(error.value)


def test_a_missing_column_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(Failure, match=r"t\.csv has no column 'text': it has 'a', 'b'"):
        read_table(b"a,b\n1,2\n", "t.csv").column("text")


def drawn(labels: list[Any], splits: list[str | None] | None = None, groups: list[Any] | None = None) -> list[str]:
    return assign_splits(labels, splits=splits, groups=groups, val_fraction=0.1, test_fraction=0.2, seed=3)


def test_missing_splits_are_drawn_from_each_class() -> None:
    labels = ["a"] * 100 + ["b"] * 50
    result = drawn(labels)
    assert Counter(zip(labels, result, strict=True)) == {
        ("a", "train"): 72,
        ("a", "val"): 8,
        ("a", "test"): 20,
        ("b", "train"): 36,
        ("b", "val"): 4,
        ("b", "test"): 10,
    }
    assert drawn(labels) == result


def test_a_named_split_is_kept_and_val_is_drawn_as_everywhere_else() -> None:
    labels = ["b", "a"] * 40
    splits: list[str | None] = [*["Train"] * 60, *["test"] * 20]
    _, held = stratified_holdout(np.array(labels[:60]), 0.1, 3)
    assert np.flatnonzero(np.array(drawn(labels, splits)) == "val").tolist() == held.tolist()
    assert drawn(labels, splits)[60:] == ["test"] * 20
    splits = [*["dev"] * 30, *[None] * 30, *splits[60:]]
    assert drawn(labels, splits) == ["val"] * 30 + ["train"] * 30 + ["test"] * 20


def test_no_group_straddles_splits_and_each_class_comes_near_its_share() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 300, 2000).tolist()
    labels = ["ab"[group % 3 == 0] for group in groups]
    result = drawn(labels, groups=groups)
    of_group = {group: {split for g, split in zip(groups, result, strict=True) if g == group} for group in set(groups)}
    assert all(len(splits) == 1 for splits in of_group.values())
    for label in "ab":
        share = np.mean([split == "test" for name, split in zip(labels, result, strict=True) if name == label])
        assert share == pytest.approx(0.2, abs=0.01)


def test_a_group_joins_the_split_of_its_members_and_may_not_have_two() -> None:
    groups = [1, 1, 2, 3, 4, 5]
    assert drawn([0] * 6, ["test", None, "val", None, None, None], groups) == ["test"] * 2 + ["val"] + ["train"] * 3
    with pytest.raises(Failure, match="group 1 has examples in test and in train: "):
        drawn([0] * 6, ["test", "train", None, None, None, None], groups)


@pytest.mark.parametrize(
    ("labels", "splits", "groups", "message"),
    [
        ([0, 0], ["train", "tset"], None, "row 2: 'tset' is no split: write one of train, val, "),
        ([0, 0], None, ["x", "x"], "all examples to draw from are of the group 'x'"),
        ([0, 1], None, ["x", "y"], "each group has the only examples of a class"),
        ([0, 0], ["test", "test"], None, "no example is left of which val could be drawn"),
    ],
)
def test_splits_that_cannot_be_drawn_are_refused(labels: Any, splits: Any, groups: Any, message: str) -> None:
    with pytest.raises(Failure) as error:
        drawn(labels, splits, groups)
    assert message in str(error.value)
