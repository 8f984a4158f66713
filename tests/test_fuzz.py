"""Parsers of external input on damaged input: it is read, or refused with the documented error."""

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
from src.data import packed, tokens
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.image_files import decode
from src.data.kinds.text import tokenize
from src.data.packed import Packed, PackedError
from src.data.writing import write_packed
from tests.test_archives import FILES, tar_bytes, tar_member, zip_bytes
from tests.tiny_data import plain_png

# The same examples on every machine, without a database between runs.
settings.register_profile(
    "bounded",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("bounded")


def refusal(error: type[Failure], read: Callable[[], object]) -> str | None:
    """The message of the error that `read` raised; None if it raised none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except error as failure:
        return str(failure)
    return None


@st.composite
def damaged(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of the valid files after one to four edits."""
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 600))
        match draw(st.sampled_from(["overwrite", "insert", "remove", "repeat", "cut"])):
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=12))
                content[offset : offset + len(new)] = new
            case "insert":
                content[offset:offset] = draw(st.binary(min_size=1, max_size=12))
            case "remove":
                del content[offset : offset + length]
            case "repeat":
                content[offset:offset] = content[offset : offset + length]
            case "cut":
                del content[offset:]
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
COMPRESSIONS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, bz2.compress, lzma.compress]
MAX_BYTES = 50_000


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A damaged archive; some tars with corrected checksums, so that the damage is not detected by them."""
    if draw(st.booleans()):
        return draw(damaged(ZIPS))
    content = bytearray(draw(damaged(TARS)))
    if draw(st.booleans()):
        for start in range(0, len(content) - 511, 512):
            if content[start + 257 : start + 262] == b"ustar":
                content[start + 148 : start + 156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    compressed = draw(st.sampled_from(COMPRESSIONS))(bytes(content))
    return draw(damaged([compressed])) if draw(st.booleans()) else compressed


@settings(max_examples=1000)
@given(content=archives())
def test_a_damaged_archive_is_read_safely_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "archive"
    path.write_bytes(content)
    members: list[tuple[str, bytes]] = []
    message = refusal(
        SourceError, lambda: members.extend(read_archive(path, max_bytes=MAX_BYTES, max_member_bytes=MAX_BYTES))
    )
    assert message is None or str(path) in message
    assert sum(len(data) for _, data in members) <= MAX_BYTES
    for name, _ in members:
        assert not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def pictures() -> list[bytes]:
    """A picture in every common format."""
    import io

    from PIL import Image

    files = [plain_png((255, 0, 0), (20, 10))]
    for kind in ("JPEG", "GIF", "BMP", "PPM", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(600, dtype=np.uint8).reshape(10, 20, 3)).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


@settings(max_examples=500)
@given(content=damaged(pictures()))
def test_a_damaged_picture_is_decoded_or_refused(content: bytes) -> None:
    message = refusal(SourceError, lambda: decode(content, "a.png"))
    assert message is None or message.startswith("a.png can't be read as an image")


# --- configurations ---------------------------------------------------------------------------------------------------

VALID = [
    compose([f"experiment={path.stem}", "output=out"]).plain() for path in sorted((CONF / "experiment").glob("*.yaml"))
]
TARGETS = [
    ".".join([*path.relative_to(ROOT).with_suffix("").parts, line.split()[1].split("(")[0].rstrip(":")])
    for room in ("data", "models")
    for path in sorted((ROOT / "src" / room).rglob("*.py"))
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
    """A valid configuration after one to three changes at any depth."""
    content = copy.deepcopy(draw(st.sampled_from(VALID)))
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


def assert_checked_or_refused(content: Any, schema: type[DataConfig]) -> None:
    message = refusal(ConfigError, lambda: check(content, schema).packing)
    assert message != ""


@settings(max_examples=250)
@given(content=configurations(), schema=st.sampled_from([Config, DataConfig]))
def test_a_changed_configuration_is_checked_or_refused(content: dict[str, Any], schema: type[DataConfig]) -> None:
    assert_checked_or_refused(content, schema)
    try:
        composed = OmegaConf.create(content)
    except OmegaConfBaseException:  # not possible in YAML
        return
    assert_checked_or_refused(composed, schema)


def test_a_configuration_with_any_target_is_checked_or_refused() -> None:
    assert len(TARGETS) > 50
    for target in TARGETS:
        for section in ("data", "model"):
            content = copy.deepcopy(VALID[0])
            content[section]["_target_"] = target
            assert_checked_or_refused(content, Config)


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
@given(words=st.lists(overrides, min_size=1, max_size=2))
@example(words=["a" * 300 + "=1"])
@example(words=["seed=${seed}"])
@example(words=["model.optimizer=${model}"])
def test_any_override_is_composed_or_refused(words: list[str]) -> None:
    assert refusal(ConfigError, lambda: compose(["experiment=imdb_lstm", "output=out", *words])) != ""


# --- texts ------------------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(text=st.text() | st.text("ab .,'!?()<>br/;:\"\t\n"))
def test_the_exported_tokenizer_equals_the_one_of_training_on_any_text(text: str) -> None:
    (expected,) = tokens.tokenize([text])
    assert (tokenize(text, tokens.basic_english()) or [packed.UNKNOWN]) == expected


# --- packed splits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(folder: Path) -> Path:
    """A folder that every example writes to."""
    return folder / "packed"


def valid_split() -> tuple[bytes, bytes]:
    """The bytes of a meta.json and of a split file."""
    import tempfile

    arrays: dict[str, np.ndarray] = {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.arange(2)}
    with tempfile.TemporaryDirectory() as folder:
        data = Packed({"train": arrays}, {"kind": "images", "classes": ["a", "ü"]})
        write_packed(data, Path(folder), config={"name": "tiny"}, source={"origin": "sample"})
        return Path(folder, "meta.json").read_bytes(), Path(folder, "train.safetensors").read_bytes()


META, SPLIT = valid_split()


@settings(max_examples=400)
@given(content=damaged([META]) | st.binary(max_size=20) | values.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"splits": {"train": {}}, "config": {}, "source": {}}')
def test_a_damaged_meta_is_read_or_refused(content: bytes, splits: Path) -> None:
    splits.mkdir(exist_ok=True)
    (splits / "meta.json").write_bytes(content)
    (splits / "train.safetensors").write_bytes(SPLIT)
    message = refusal(PackedError, lambda: packed.read_split(splits, "train"))
    assert message is None or str(splits) in message


@settings(max_examples=400)
@given(content=damaged([SPLIT]), has_its_digest=st.booleans())
def test_a_damaged_split_is_read_or_refused_with_or_without_its_digest(
    content: bytes, has_its_digest: bool, splits: Path
) -> None:
    splits.mkdir(exist_ok=True)
    path = splits / "train.safetensors"
    path.write_bytes(content)
    meta = json.loads(META)
    if has_its_digest:
        meta["splits"]["train"]["sha256"] = sha256_of(path)
    (splits / "meta.json").write_text(json.dumps(meta))
    message = refusal(PackedError, lambda: [tensor.numel() for tensor in packed.read_split(splits, "train").values()])
    assert str(path) in message if message is not None else has_its_digest or content == SPLIT
