"""Tables of numbers: how they are read and refused, and the GAN that generates their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from src.common.errors import Failure
from src.configuration.composing import compose
from src.data.kinds.table import TableBatches, TableLoader, parse
from src.data.sets.tables import Tables
from src.models.table_gan import RowsAgainstReal
from tests.tiny_data import write_tar


@pytest.mark.parametrize(
    ("content", "columns", "rows"),
    [
        (b"x,y\n1,2\n3,4.5\n", ["x", "y"], [[1, 2], [3, 4.5]]),
        (b"1\t2\n-3e1\t4\n\n", ["0", "1"], [[1, 2], [-30, 4]]),
        ("\ufeffa,b\r\n1,2\r\n".encode(), ["a", "b"], [[1, 2]]),
        (b'"x, wide",y\n1,2\n', ["x, wide", "y"], [[1, 2]]),
    ],
)
def test_csv_and_tsv_are_read_with_and_without_a_header(
    content: bytes, columns: list[str], rows: list[list[float]]
) -> None:
    header, values = parse(content, "t.csv")
    assert header == columns
    assert values.tolist() == rows
    assert values.dtype == np.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv holds no row"),
        (b"x,y\n1,2\n3\n", "t.csv, line 3: 1 cells where the first line has 2"),
        (b"x,y\n1,two\n", "t.csv, line 2, column y: 'two' is no finite number"),
        (b"x\n1\nnan\n", "t.csv, line 3, column x: 'nan' is no finite number"),
        (b"x\n1e99\n", "line 2, column x: '1e99' is no finite number"),
        (b"\xff\n", "t.csv is not UTF-8"),
    ],
)
def test_what_is_no_table_is_refused_with_its_line(content: bytes, message: str) -> None:
    with pytest.raises(Failure) as error:
        parse(content, "t.csv")
    assert message in str(error.value)


def csv(values: np.ndarray) -> bytes:
    return "\n".join(["x,y,fixed", *(f"{x},{y},7" for x, y in values)]).encode()


def test_columns_are_standardised_by_the_training_part(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    files = {
        f"t/{split}.csv": csv(random.normal((3, -1), (2, 0.1), (n, 2))) for split, n in (("train", 80), ("test", 9))
    }
    data = Tables(val_fraction=0.25).pack(write_tar(tmp_path / "t.tar", files | {"t/readme.md": b"x"}))
    assert {split: len(arrays["rows"]) for split, arrays in data.splits.items()} == {"train": 60, "val": 20, "test": 9}
    train: Any = data.splits["train"]["rows"]
    assert train.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert train.std(0).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    _, test = parse(files["t/test.csv"], "")
    restored = data.splits["test"]["rows"] * data.meta["std"] + data.meta["mean"]
    np.testing.assert_allclose(restored, test, rtol=1e-4, atol=1e-4)
    assert data.unused == {"of another kind": 1}


def test_one_file_is_cut_into_splits(tmp_path: Path) -> None:
    files = {"t/numbers.tsv": csv(np.random.default_rng(0).normal(size=(100, 2)))}
    data = Tables().pack(write_tar(tmp_path / "t.tar", files))
    assert [len(data.splits[split]["rows"]) for split in ("train", "val", "test")] == [72, 8, 20]


def test_every_table_format_packs_to_the_same_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 2)), columns=["x", "y"])
    files = {
        "n.csv": frame.to_csv(index=False).encode(),
        "n.jsonl": frame.to_json(orient="records", lines=True, double_precision=15).encode(),
        "n.parquet": frame.to_parquet(),
    }
    packed: list[Any] = [
        Tables().pack(write_tar(tmp_path / "t.tar", {name: content})).splits for name, content in files.items()
    ]
    for other in packed[1:]:
        for split, arrays in packed[0].items():
            assert np.array_equal(arrays["rows"], other[split]["rows"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"t/train.csv": b"x\n1\n2\n"}, "no train.csv and test.csv in it"),
        ({"t/train.csv": b"x\n1\n", "t/test.csv": b"y\n1\n"}, "test.csv has other columns"),
        ({"t/val.csv": b"x\n1\n", "t/dev.csv": b"x\n1\n"}, "dev.csv is the second table of its split"),
        ({"t/train.csv": b"x\n1\n?\n"}, "train.csv, line 3, column x: '?'"),
    ],
)
def test_other_archives_are_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(Failure) as error:
        Tables().pack(write_tar(tmp_path / "t.tar", files))
    assert message in str(error.value)


def test_batches_are_rows_in_an_order_of_the_epoch() -> None:
    split = {"rows": torch.arange(6.0).view(6, 1)}
    batches = TableBatches(split, {"kind": "table"}, TableLoader(batch_size=2), train=True)
    first = torch.cat([rows for (rows,) in batches]).flatten().tolist()
    batches.set_epoch(1)
    assert sorted(first) == list(range(6))
    assert torch.cat([rows for (rows,) in batches]).flatten().tolist() != first


def test_the_generator_s_rows_are_not_bounded_and_the_discriminator_sees_them_as_they_are() -> None:
    model = compose(["experiment=curves_gan", "output=out"]).model({"shape": [5]})
    rows = torch.full((2, 5), 3.0)
    assert torch.equal(model.real((rows,)), rows)
    with torch.no_grad():
        model.generator.layers[-3].bias.fill_(9)
        assert float(model.eval().answer(torch.zeros(2, 64)).min()) > 5


def test_the_frechet_distance_of_rows_is_that_of_their_gaussians() -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 3, generator=random)
    metric = RowsAgainstReal()
    metric.update(real=real)
    metric.update(drawn=2 * torch.randn(4000, 3, generator=random) + torch.tensor([1.0, 0, 0]))
    distances = metric.compute()
    assert distances["frechet"] == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.1)
    assert metric.real_count == 4000
