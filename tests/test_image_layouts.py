"""Images and pairs in every layout: class folders alone, manifests, A/ and B/; fit; damaged files skipped."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from pyarrow import parquet

from src.configuration.schema import FileColumns
from src.data.fetching.files import SourceError
from src.data.kinds.images import Images, read_image
from src.data.packed import Packed
from src.data.sets.domains import UnpairedDomains
from src.data.sets.facades import PairedImages
from src.data.sets.image_folder import ImageFolders
from src.data.writing import write_packed
from tests.conftest import Run
from tests.test_runs import output_of
from tests.tiny_data import packed_data, plain_png, png, write_tar

NOISE = np.random.default_rng(0).integers(0, 256, (31, 47, 3), np.uint8)


def shade(number: int) -> bytes:
    """A picture whose red is `number`."""
    return plain_png((number, 0, 0))


def shades(data: Packed, key: str = "images") -> dict[str, list[int]]:
    """The red of each packed picture, by split."""
    return {split: arrays[key][:, 0, 0, 0].tolist() for split, arrays in data.splits.items()}


def refusal(dataset: Any, archive: Path) -> str:
    with pytest.raises(SourceError) as error:
        packed_data(dataset, archive)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- class folders alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["mine/", "mine/photos/", ""])
def test_each_class_of_a_folder_gives_its_share_to_test_and_val(top: str, tmp_path: Path) -> None:
    members = {
        f"{top}{label}/{i}.png": shade(i + 100 * (label == "dog")) for label in ("cat", "dog") for i in range(20)
    }
    archive = write_tar(tmp_path / "i.tar", members | {f"{top}notes.txt": b"x"})
    dataset = ImageFolders(size=8, val_fraction=0.25, test_fraction=0.2)
    data = packed_data(dataset, archive)
    assert {split: np.bincount(a["labels"]).tolist() for split, a in data.splits.items()} == {
        "train": [12, 12],
        "val": [4, 4],
        "test": [4, 4],
    }
    split_shades = shades(data)
    assert sorted(chain(*split_shades.values())) == [*range(20), *range(100, 120)]
    for split, values in split_shades.items():
        assert [value >= 100 for value in values] == data.splits[split]["labels"].tolist()
    assert shades(packed_data(dataset, archive)) == split_shades
    assert shades(packed_data(ImageFolders(size=8, split_seed=1), archive)) != split_shades


def test_class_folders_in_two_folders_without_splits_are_refused(tmp_path: Path) -> None:
    members = {f"mine/{part}/{label}/0.png": shade(0) for part in ("training", "testing") for label in "ab"}
    message = refusal(ImageFolders(), write_tar(tmp_path / "i.tar", members))
    assert "class folders in mine/testing/ and in mine/training/: call these train/ and test/" in message


# --- manifests --------------------------------------------------------------------------------------------------------

ROWS = [
    (f"photos/{i:02}.png", "cat" if i % 2 else "dog", "test" if i >= 16 else "", f"person {i // 4}") for i in range(24)
]


def table(suffix: str, rows: Sequence[tuple[str, ...]] = ROWS) -> bytes:
    """A manifest of these rows."""
    names = ("file", "label", "split", "group")
    if suffix == ".parquet":
        buffer = io.BytesIO()
        parquet.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), buffer)
        return buffer.getvalue()
    if suffix == ".jsonl":
        return "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows).encode()
    separator = {".csv": ",", ".tsv": "\t"}[suffix]
    return b"\xef\xbb\xbf" + "\n".join(separator.join(row) for row in [names, *rows]).encode()


def with_manifest(folder: Path, content: bytes, name: str = "mine/labels.csv", **more: bytes) -> Path:
    photos = {f"mine/photos/{i:02}.png": shade(i) for i in range(24)}
    return write_tar(folder / "m.tar", {name: content, **photos, **more})


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_manifest_names_files_classes_and_splits(suffix: str, tmp_path: Path) -> None:
    archive = with_manifest(tmp_path, table(suffix), f"mine/labels{suffix}", **{"mine/extra.png": shade(0)})
    data = packed_data(ImageFolders(size=8, manifest=f"labels{suffix}", columns=FileColumns(split="split")), archive)
    assert data.meta["classes"] == ["cat", "dog"]
    assert shades(data)["test"] == list(range(16, 24))
    assert sorted(shades(data)["train"] + shades(data)["val"]) == list(range(16))
    assert len(shades(data)["val"]) == 2
    for split, values in shades(data).items():
        assert data.splits[split]["labels"].tolist() == [1 - value % 2 for value in values]
    assert data.unused == {"not in the manifest": 1}


def test_a_group_never_straddles_splits(tmp_path: Path) -> None:
    dataset = ImageFolders(
        size=8, manifest="labels.csv", columns=FileColumns(group="group"), val_fraction=0.3, test_fraction=0.3
    )
    groups = {
        split: {value // 4 for value in values}
        for split, values in shades(packed_data(dataset, with_manifest(tmp_path, table(".csv")))).items()
    }
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 6


def test_a_path_of_a_manifest_is_relative_to_it(tmp_path: Path) -> None:
    rows = [(rf"..\photos\{i:02}.png", str(i % 2), "", "") for i in range(24)]
    archive = with_manifest(tmp_path, table(".csv", rows), "mine/tables/labels.csv")
    data = packed_data(ImageFolders(size=8, manifest="tables/labels.csv"), archive)
    assert sorted(chain(*shades(data).values())) == list(range(24))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*ROWS, ("photos/99.png", "cat", "", "")], {}, "line 26: the file 'photos/99.png' is not in the archive"),
        (
            [*ROWS, ("../../etc/passwd", "cat", "", "")],
            {},
            "line 26: the file '../../etc/passwd' is not in the archive",
        ),
        ([*ROWS, ROWS[0]], {}, "line 26: 'photos/00.png' stands already in"),
        ([("photos/00.png", " ", "", ""), *ROWS[1:]], {}, "line 2: no label"),
        (
            ROWS,
            {"columns": FileColumns(label="species")},
            "no column 'species': it has 'file', 'label', 'split', 'group'",
        ),
        ([(*ROWS[0][:2], "dev2", ""), *ROWS[1:]], {"columns": FileColumns(split="split")}, "'dev2' is no split"),
        (
            ROWS,
            {"manifest": "classes.csv"},
            "data.manifest=classes.csv: no such file in it: its tables are mine/labels.csv",
        ),
        ([ROWS[0], ROWS[2], ROWS[4]], {}, "train/ has only the class 'dog'"),
    ],
)
def test_a_wrong_manifest_is_refused_by_line(rows: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    archive = with_manifest(tmp_path, table(".csv", rows))
    assert message in refusal(ImageFolders(**{"manifest": "labels.csv", **options}), archive)


# --- sizes, fit, channels ---------------------------------------------------------------------------------------------

SIZE, BICUBIC = (24, 16), Image.Resampling.BICUBIC
FITS = {
    "stretch": lambda picture: picture.resize(SIZE, BICUBIC),
    "crop": lambda picture: ImageOps.fit(picture, SIZE, BICUBIC),
    "pad": lambda picture: ImageOps.pad(picture, SIZE, BICUBIC, "teal"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", FITS)
def test_packing_prediction_and_the_model_card_fit_images_alike(fit: Any, channels: Any, tmp_path: Path) -> None:
    expected = np.asarray(FITS[fit](Image.fromarray(NOISE).convert("RGB" if channels == 3 else "L")))
    expected = expected.reshape(16, 24, channels).transpose(2, 0, 1)
    (tmp_path / "input.png").write_bytes(png(NOISE))
    members = {
        f"m/{split}/{label}/{i}.png": png(NOISE) for split in ("train", "test") for label in "ab" for i in (0, 1)
    }
    dataset = ImageFolders(size=[16, 24], fit=fit, channels=channels, background="teal")
    data = packed_data(dataset, write_tar(tmp_path / "i.tar", members))
    assert data.meta["shape"] == [channels, 16, 24]
    assert np.array_equal(data.splits["train"]["images"][0], expected)
    signature = Images().signature(data.meta, None)  # type: ignore[arg-type]
    assert np.array_equal(read_image(str(tmp_path / "input.png"), signature)[0], expected)
    names: dict[str, Any] = {"np": np}
    snippet = Images().snippet(signature).replace("input.png", str(tmp_path / "input.png"))
    exec(snippet, names)
    assert np.array_equal(names["image"][0], expected)


# --- damaged files ----------------------------------------------------------------------------------------------------


def test_skipped_files_leave_what_an_archive_without_them_gives(tmp_path: Path) -> None:
    members = {
        f"m/{split}/{label}/{i:02}.png": shade(i) for split in ("train", "test") for label in "ab" for i in range(20)
    }
    bad = {"m/train/a/07.png": png(NOISE)[:-200], "m/test/b/00.png": b"no image", "m/train/b/19.png": b""}
    archive = write_tar(tmp_path / "bad.tar", members | bad)
    sound = write_tar(tmp_path / "sound.tar", {name: c for name, c in members.items() if name not in bad})
    assert "m/train/a/07.png can't be read as an image" in refusal(ImageFolders(size=8), archive)
    metas = {}
    for path, on_bad in ((archive, "skip"), (sound, "refuse")):
        dataset = ImageFolders(size=8, on_bad=on_bad)  # type: ignore[arg-type]
        metas[path] = write_packed(dataset.pack(path), tmp_path / path.stem, config={}, source={})
    assert metas[archive]["splits"] == metas[sound]["splits"]
    assert [name for name, _ in metas[archive]["bad"]] == sorted(bad)
    assert all("can't be read as an image" in reason for _, reason in metas[archive]["bad"])
    assert "bad" not in metas[sound]


def test_a_class_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    members = {
        f"m/{split}/{label}/{i}.png": shade(i) for split in ("train", "test") for label in "abc" for i in range(2)
    }
    bad = {name: b"no image" for name in members if "/c/" in name}
    message = refusal(ImageFolders(size=8, on_bad="skip"), write_tar(tmp_path / "i.tar", members | bad))
    assert "no file of the class 'c' in train/ can be read" in message


def test_nothing_is_replaced_where_a_file_is_damaged(tmp_path: Path) -> None:
    members = {
        f"m/{split}/{label}/{i}.png": shade(i) for split in ("train", "test") for label in "ab" for i in range(3)
    }
    write_packed(
        ImageFolders(size=8).pack(write_tar(tmp_path / "i.tar", members)), tmp_path / "p", config={}, source={}
    )
    before = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    archive = write_tar(tmp_path / "j.tar", members | {"m/test/b/2.png": b"no image"})
    with pytest.raises(SourceError, match=r"m/test/b/2\.png can't be read as an image"):
        write_packed(ImageFolders(size=4).pack(archive), tmp_path / "p", config={}, source={})
    assert {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()} == before


def test_facts_of_each_file_stand_in_the_order_of_the_rows(tmp_path: Path) -> None:
    members = {
        f"m/{split}/{label}/{i}.png": png(NOISE[: 10 + i])
        for split in ("train", "test")
        for label in "ab"
        for i in range(9)
    }
    members["m/test/a/grey.png"] = png(NOISE[:, :, 0])
    write_packed(
        ImageFolders(size=8).pack(write_tar(tmp_path / "i.tar", members)), tmp_path / "p", config={}, source={}
    )
    facts = parquet.read_table(tmp_path / "p" / "facts.parquet").to_pylist()
    assert [(row["split"], row["row"]) for row in facts] == [
        (split, row) for split, count in (("train", 16), ("val", 2), ("test", 19)) for row in range(count)
    ]
    for row in facts:
        height = 31 if "grey" in row["name"] else 10 + int(Path(row["name"]).stem)
        mode = "L" if "grey" in row["name"] else "RGB"
        assert (row["width"], row["height"], row["mode"]) == (47, height, mode)
        assert row["bytes"] == len(members[row["name"]])


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["m/{split}/{folder}/{i}.png", "m/{folder}/{split}/{i}.png", "{folder}/{split}/x/{i}.png"]
)
def test_files_of_equal_names_in_a_and_b_are_pairs(layout: str, tmp_path: Path) -> None:
    members = {}
    for split, count in (("train", 12), ("val", 2), ("test", 3)):
        for i in range(count):
            members[layout.format(split=split, folder="A", i=i)] = shade(i)
            members[layout.format(split=split, folder="B", i=i).replace("png", "bmp")] = shade(100 + i)
    data = packed_data(PairedImages(size=8, direction="BtoA"), write_tar(tmp_path / "p.tar", members))
    assert shades(data, "target") == {"train": list(range(12)), "val": [0, 1], "test": [0, 1, 2]}
    assert shades(data, "input") == {"train": list(range(100, 112)), "val": [100, 101], "test": [100, 101, 102]}


def test_pairs_in_a_and_b_without_splits_are_drawn(tmp_path: Path) -> None:
    members = {f"m/{folder}/{i}.png": shade(i) for folder in "AB" for i in range(20)}
    data = packed_data(PairedImages(size=8, test_fraction=0.25), write_tar(tmp_path / "p.tar", members))
    assert shades(data, "input") == shades(data, "target")
    assert {split: len(values) for split, values in shades(data, "input").items()} == {"train": 13, "val": 2, "test": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m/A/7.png": None}, "m/B/7.png has no partner: add 7 to A/, or remove it"),
        ({"m/A/3.jpg": shade(3)}, "m/A/3.png and m/A/3.jpg have the same name"),
        ({"m/B/3.png": plain_png((0, 0, 0), (16, 8))}, "m/B/3.png is 16x8, but m/A/3.png is 8x8: a pair has the same"),
    ],
)
def test_files_that_make_no_pair_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    members = {f"m/{folder}/{i}.png": shade(i) for folder in "AB" for i in range(9)} | changes
    archive = write_tar(tmp_path / "p.tar", {name: content for name, content in members.items() if content})
    assert message in refusal(PairedImages(size=8), archive)


def test_a_damaged_picture_is_skipped_with_its_partner(tmp_path: Path) -> None:
    members = {
        f"m/{split}/{folder}/{i}.png": shade(i) for split in ("train", "test") for folder in "AB" for i in range(4)
    }
    archive = write_tar(tmp_path / "p.tar", members | {"m/test/B/2.png": b"no image"})
    data = packed_data(PairedImages(size=8, on_bad="skip"), archive)
    assert shades(data, "input")["test"] == shades(data, "target")["test"] == [0, 1, 3]


def test_a_damaged_picture_of_a_domain_is_skipped(tmp_path: Path) -> None:
    members = {f"m/{part}{domain}/{i}.png": shade(i) for part in ("train", "test") for domain in "AB" for i in range(4)}
    archive = write_tar(tmp_path / "d.tar", members | {"m/testA/2.png": b"no image"})
    data = packed_data(UnpairedDomains(size=8, on_bad="skip"), archive)
    assert (shades(data, "a")["test"], shades(data, "b")["test"]) == ([0, 1, 3], [0, 1, 2, 3])


# --- through all stages -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_manifest_of_grey_photos_becomes_an_exported_and_called_model(clone: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "signs" / "photos").mkdir(parents=True)
    rows = ["path,sign,person"]
    for i in range(60):
        picture = np.full((20, 30 + i % 3, 3), 230 if i % 2 else 20, np.uint8)
        (tmp_path / "signs" / "photos" / f"{i}.png").write_bytes(png(picture))
        rows.append(f"photos/{i}.png,{'light' if i % 2 else 'dark'},{i // 4}")
    (tmp_path / "signs" / "photos" / "0.png").write_bytes(b"no image")
    (tmp_path / "signs" / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "signs.yaml").write_text(
        f"""
        _target_: src.data.sets.image_folder.ImageFolders
        name: signs
        archive: {tmp_path}/signs
        size: [12, 16]
        channels: 1
        fit: pad
        background: navy
        on_bad: skip
        manifest: labels.csv
        columns: {{file: path, label: sign, group: person}}
        loader: {{batch_size: 10}}
        """
    )
    words = (
        "--config-dir",
        str(tmp_path / "conf"),
        "+experiment=mnist_mlp",
        "data=signs",
        "profile=full",
        "tracking=false",
    )
    done = run("python", "-m", "src.train", *words, "trainer.max_epochs=5", "model.optimizer.lr=0.01")
    assert "signs: left out: signs/photos/0.png can't be read as an image" in done.stdout
    output = output_of(done.stdout)
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"../{output}", "-cn", "config", "tracking=false")
    assert json.loads((clone / output / "metrics.json").read_text())["accuracy"] == 1
    signature = json.loads((clone / output / "export" / "signature.json").read_text())
    assert (signature["shape"], signature["fit"], signature["background"]) == ([1, 12, 16], "pad", "navy")
    assert (
        "ImageOps.pad(photo, (16, 12), Image.Resampling.BICUBIC, 'navy')"
        in (clone / output / "export/README.md").read_text()
    )
    answer = run("python", "-m", "src.predict", f"{output}/export", str(tmp_path / "signs/photos/1.png"))
    assert "light" in answer.stdout.splitlines()[0]
