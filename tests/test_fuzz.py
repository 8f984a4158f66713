"""Parsers of what comes from outside, on damaged input: it is read, or refused with the error that they promise."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import tarfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.common.errors import ConfigError, Failure
from src.common.files import sha256_of
from src.common.paths import CONF, ROOT
from src.configuration.composing import check, compose
from src.configuration.schema import Config, DataConfig
from src.data import packed
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.kinds.text import tokenize
from src.data.packed import Packed, PackedError
from src.data.sets import imdb
from src.data.sets.image_folder import decode
from tests.test_archives import FILES, tar_bytes, tar_member, zip_bytes
from tests.tiny_data import plain_png

# The same examples on every machine, and nothing kept between runs.
settings.register_profile(
    "bounded",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("bounded")


def refusal(error: type[Failure], read: Callable[[], object]) -> str | None:
    """The message with which something was refused; None if it was read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except error as found:
        return str(found)
    return None


@st.composite
def damaged(draw: st.DrawFn, sound: Sequence[bytes]) -> bytes:
    """One of the sound files after one to four edits."""
    content = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 600))
        match draw(st.sampled_from(["overwrite", "insert", "remove", "repeat", "cut"])):
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=12))
                content[place : place + len(new)] = new
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=12))
            case "remove":
                del content[place : place + length]
            case "repeat":
                content[place:place] = content[place : place + length]
            case "cut":
                del content[place:]
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- archives ---------------------------------------------------------------------------------------------------------

SMALL_FILES = [(name, content[:3000]) for name, content in FILES]
TARS = [
    *(tar_bytes(*SMALL_FILES, format=kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
    tar_bytes(("n" * 150 + "/ü.txt", b"long"), tar_member("d", type=tarfile.DIRTYPE), format=tarfile.GNU_FORMAT),
    tar_bytes(("n" * 150 + "/ü.txt", b"long"), tar_member("d", type=tarfile.DIRTYPE), format=tarfile.PAX_FORMAT),
    tar_bytes(tar_member("l", type=tarfile.SYMTYPE, linkname="a"), ("a", b"1")),
]
ZIPS = [zip_bytes(*SMALL_FILES), zip_bytes(*SMALL_FILES, method=0), zip_bytes(("ü/a", b"1"), ("b/", b""))]
PACKINGS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, bz2.compress, lzma.compress]
MOST = 50_000


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A damaged archive; of a tar perhaps with its headers' sums mended, so that the damage gets past them."""
    if draw(st.booleans()):
        return draw(damaged(ZIPS))
    content = bytearray(draw(damaged(TARS)))
    if draw(st.booleans()):
        for start in range(0, len(content) - 511, 512):
            if content[start + 257 : start + 262] == b"ustar":
                content[start + 148 : start + 156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    packed_up = draw(st.sampled_from(PACKINGS))(bytes(content))
    return draw(damaged([packed_up])) if draw(st.booleans()) else packed_up


@settings(max_examples=1000)
@given(content=archives())
def test_a_damaged_archive_is_read_safely_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "archive"
    path.write_bytes(content)
    members: list[tuple[str, bytes]] = []
    said = refusal(SourceError, lambda: members.extend(read_archive(path, max_bytes=MOST, max_member_bytes=MOST)))
    assert said is None or str(path) in said
    assert sum(len(data) for _, data in members) <= MOST
    for name, _ in members:
        assert not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def pictures() -> list[bytes]:
    import io

    from PIL import Image

    made = [plain_png((255, 0, 0), (20, 10))]
    for kind in ("JPEG", "GIF", "BMP", "PPM", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(600, dtype=np.uint8).reshape(10, 20, 3)).save(buffer, kind)
        made.append(buffer.getvalue())
    return made


@settings(max_examples=500)
@given(content=damaged(pictures()))
def test_a_damaged_picture_is_decoded_or_refused(content: bytes) -> None:
    said = refusal(SourceError, lambda: decode(content, "a.png"))
    assert said is None or said.startswith("a.png can't be read as an image")


# --- configurations ---------------------------------------------------------------------------------------------------

SOUND = [
    compose([f"experiment={path.stem}", "output=out"]).plain() for path in sorted((CONF / "experiment").glob("*.yaml"))
]
TARGETS = [
    f"src.{room}.{path.stem}.{line.split()[1].split('(')[0].rstrip(':')}"
    for room in ("data", "models")
    for path in sorted((ROOT / "src" / room).glob("*.py"))
    for line in path.read_text().splitlines()
    if line.startswith(("class ", "def "))
]
ODD_TEXTS = [
    "",
    "null",
    "???",
    "src.data.",
    "src.models.lstm.TextClassifier\n",
    "os.system",
    "1e400",
    "a/../b",
    "\0",
    "ü",
]
keys = st.sampled_from(["_target_", "name", "lr", "network", "optimizer", "size", "urls", "loader", "seed"]) | st.text(
    max_size=6
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(ODD_TEXTS)
    | st.sampled_from(TARGETS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A sound configuration after one to three changes, at whatever depth."""
    content = copy.deepcopy(draw(st.sampled_from(SOUND)))
    for _ in range(draw(st.integers(1, 3))):
        section: Any = content
        while True:
            key = draw(st.sampled_from(sorted(section)))
            if not (isinstance(section[key], dict) and section[key] and draw(st.booleans())):
                break
            section = section[key]
        match draw(st.sampled_from(["replace", "replace", "target", "remove", "rename", "add"])):
            case "replace":
                section[key] = draw(values)
            case "target":
                section["_target_"] = draw(st.sampled_from(TARGETS))
            case "remove":
                del section[key]
            case "rename":
                section[draw(keys)] = section.pop(key)
            case "add":
                section[draw(keys | st.integers(0, 3))] = draw(values)
        if not content or any(not isinstance(key, str) for key in section):
            break
    return content


def refused_or_checked(content: Any, schema: type[DataConfig]) -> None:
    said = refusal(ConfigError, lambda: check(content, schema).packing)
    assert said != ""


@settings(max_examples=250)
@given(content=configurations(), schema=st.sampled_from([Config, DataConfig]))
def test_a_changed_configuration_is_checked_or_refused(content: dict[str, Any], schema: type[DataConfig]) -> None:
    refused_or_checked(content, schema)
    try:
        composed = OmegaConf.create(content)
    except OmegaConfBaseException:  # no YAML would become this
        return
    refused_or_checked(composed, schema)


def test_whatever_target_is_named_the_configuration_is_checked_or_refused() -> None:
    assert len(TARGETS) > 50
    for target in TARGETS:
        for section in ("data", "model"):
            content = copy.deepcopy(SOUND[0])
            content[section]["_target_"] = target
            refused_or_checked(content, Config)


overrides = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "+", "++", "~"]),
    st.sampled_from(["seed", "model.optimizer", "data.loader.batch_size", "profile", "data", "model._target_", "name"])
    | st.text(max_size=6),
    st.sampled_from(
        ["${seed}", "${nowhere}", "${name}", "${by_profile:{sample: 1}}", "${by_profile:1}", "{a: ", "[1,2]"]
    )
    | st.sampled_from(["${oc.env:NOWHERE}", "${", "???", "{}", "null", "1,2", "'", "\\", "${oc.decode:'{'}"])
    | st.text(max_size=8),
)


@settings(max_examples=40)
@given(given_words=st.lists(overrides, min_size=1, max_size=2))
@example(given_words=["a" * 300 + "=1"])
@example(given_words=["seed=${seed}"])
@example(given_words=["model.optimizer=${model}"])
def test_whatever_is_typed_is_composed_or_refused(given_words: list[str]) -> None:
    assert refusal(ConfigError, lambda: compose(["experiment=imdb_lstm", "output=out", *given_words])) != ""


# --- texts ------------------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(text=st.text() | st.text("ab .,'!?()<>br/;:\"\t\n"))
def test_a_caller_of_the_exported_model_reads_any_text_as_training_did(text: str) -> None:
    (trained_on,) = imdb.tokenize([text])
    assert (tokenize(text, imdb.tokenizer_settings()) or [packed.UNKNOWN]) == trained_on


# --- packed splits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(folder: Path) -> Path:
    """A folder that is written anew by each example."""
    return folder / "packed"


def sound_splits() -> tuple[bytes, bytes]:
    """The bytes of a meta.json and of a split."""
    import tempfile

    arrays: dict[str, np.ndarray] = {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.arange(2)}
    with tempfile.TemporaryDirectory() as place:
        made = Packed({"train": arrays}, {"kind": "images", "classes": ["a", "ü"]})
        packed.write(made, Path(place), config={"name": "tiny"}, source={"origin": "sample"})
        return Path(place, "meta.json").read_bytes(), Path(place, "train.safetensors").read_bytes()


META, SPLIT = sound_splits()


@settings(max_examples=400)
@given(content=damaged([META]) | st.binary(max_size=20) | values.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"splits": {"train": {}}, "config": {}, "source": {}}')
def test_a_damaged_meta_is_read_or_refused(content: bytes, splits: Path) -> None:
    splits.mkdir(exist_ok=True)
    (splits / "meta.json").write_bytes(content)
    (splits / "train.safetensors").write_bytes(SPLIT)
    said = refusal(PackedError, lambda: packed.read_split(splits, "train"))
    assert said is None or str(splits) in said


@settings(max_examples=400)
@given(content=damaged([SPLIT]), listed=st.booleans())
def test_a_damaged_split_is_read_or_refused_also_where_its_digest_is_right(
    content: bytes, listed: bool, splits: Path
) -> None:
    splits.mkdir(exist_ok=True)
    path = splits / "train.safetensors"
    path.write_bytes(content)
    meta = json.loads(META)
    if listed:
        meta["splits"]["train"]["sha256"] = sha256_of(path)
    (splits / "meta.json").write_text(json.dumps(meta))
    said = refusal(PackedError, lambda: [tensor.numel() for tensor in packed.read_split(splits, "train").values()])
    assert str(path) in said if said is not None else listed or content == SPLIT
