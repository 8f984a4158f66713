"""Code fingerprints: what a stage's result depends on. (The real `dvc status` is asked in test_reruns.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from src.common.files import sha256_of
from src.common.paths import ROOT
from src.configuration.composing import compose
from src.configuration.fingerprints import NEUTRAL, Code, archive_fingerprint, closure, stage_code

TRAIN = '''"""The stage."""
import numpy as np
from src.network import Network
from src.tracking import Tracker


def main():
    from src.late import late  # inside a function

    return late(Network, Tracker, np.zeros(3))
'''
FILES = {
    "src/__init__.py": "",
    "src/train.py": TRAIN,
    "src/network.py": "from src import layers\n\nclass Network:\n    width: int = 3\n    depth = layers.DEPTH\n",
    "src/layers.py": "DEPTH = 2\n\ndef check(x: int) -> int:\n    if x < 0:\n        raise ValueError('negative')\n",
    "src/late.py": "import torch\n\ndef late(*parts):\n    return torch.stack(parts)\n",
    "src/tracking.py": "import mlflow\n\nclass Tracker: ...\n",
    "src/other.py": "x = 1\n",
    "requirements.lock": "mlflow==3.1\nnumpy==2.0 \\\n    --hash=sha256:aa\npillow==11.0\ntorch==2.11 ; a > '3'\n",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def code(repository: Path) -> Code:
    return closure(["src.train"], frozenset({"src.tracking"}), repository)


def test_the_closure_holds_what_is_imported_at_any_depth_and_the_locked_versions_of_packages(repository: Path) -> None:
    assert list(code(repository).modules) == ["src/late.py", "src/layers.py", "src/network.py", "src/train.py"]
    assert code(repository).packages == {"numpy": "2.0", "torch": "2.11"}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        pytest.param("src/layers.py", "DEPTH = 2", "DEPTH = 2  # why", id="comment"),
        pytest.param("src/train.py", '"""The stage."""', '"""Another text."""', id="docstring"),
        pytest.param("src/layers.py", "def check", "\n\ndef check", id="formatting"),
        pytest.param("src/layers.py", "'negative'", "'x must not be negative'", id="error message"),
        pytest.param("src/layers.py", "(x: int) -> int", "(x)", id="annotations of a function"),
        pytest.param("src/late.py", "    return", "    print('late')\n    return", id="print"),
        pytest.param("src/tracking.py", "class", "import rich\n\nclass", id="neutral module"),
        pytest.param("src/other.py", "1", "2", id="module that is not imported"),
        pytest.param("requirements.lock", "mlflow==3.1", "mlflow==3.2", id="package of a neutral module"),
        pytest.param("requirements.lock", "pillow==11.0", "pillow==12.0", id="package that is not imported"),
    ],
)
def test_what_no_result_depends_on_changes_no_fingerprint(repository: Path, name: str, old: str, new: str) -> None:
    before = code(repository)
    edit(repository / name, old, new)
    assert code(repository) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "module"),
    [
        pytest.param("src/layers.py", "DEPTH = 2", "DEPTH = 3", "src/layers.py", id="constant"),
        pytest.param("src/layers.py", "x < 0", "x <= 0", "src/layers.py", id="condition of an error"),
        pytest.param("src/layers.py", "ValueError", "TypeError", "src/layers.py", id="kind of an error"),
        pytest.param("src/network.py", "width: int = 3", "width: int = 4", "src/network.py", id="class attribute"),
        pytest.param("src/late.py", "torch.stack", "torch.cat", "src/late.py", id="import inside a function"),
        pytest.param(
            "src/late.py", "import torch", "import torch\nfrom src import other", "src/other.py", id="new import"
        ),
    ],
)
def test_code_that_is_executed_changes_the_fingerprint_and_is_named(
    repository: Path, name: str, old: str, new: str, module: str
) -> None:
    before = code(repository)
    edit(repository / name, old, new)
    after = code(repository)
    assert after.fingerprint != before.fingerprint
    assert before.modules.get(module) != after.modules[module]


def test_another_locked_version_of_an_imported_package_changes_the_fingerprint(repository: Path) -> None:
    before = code(repository).fingerprint
    edit(repository / "requirements.lock", "torch==2.11", "torch==2.12")
    assert code(repository).fingerprint != before


def test_a_type_checking_import_is_none(repository: Path) -> None:
    before = code(repository).fingerprint
    guarded = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from src.other import x\n\n"
    plain = "from typing import TYPE_CHECKING\n\n"
    edit(repository / "src/layers.py", "DEPTH", f"{plain}DEPTH")
    with_plain = code(repository).fingerprint
    edit(repository / "src/layers.py", plain, guarded)
    assert before != with_plain == code(repository).fingerprint


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --- this repository --------------------------------------------------------------------------------------------------


def test_every_neutral_module_exists() -> None:
    for name in NEUTRAL:
        if name.startswith("src."):
            path = ROOT.joinpath(*name.split("."))
            assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_a_training_depends_on_its_own_model_and_no_other() -> None:
    lstm = stage_code("train", compose(["experiment=imdb_lstm", "output=."])).modules
    resnet = stage_code("train", compose(["experiment=cifar10_resnet", "output=."])).modules
    assert "src/models/lstm.py" in lstm.keys() - resnet.keys()
    assert "src/models/resnet.py" in resnet.keys() - lstm.keys()
    for modules in (lstm, resnet):
        assert "src/common/hardware.py" in modules  # decides bf16
        assert not [name for name in modules if name.startswith(("src/tracking", "src/reporting/plots", "src/tasks"))]


def test_a_data_report_depends_on_its_own_kind_and_packing_on_no_report() -> None:
    config = compose(["experiment=imdb_lstm", "output=."])
    described, packed = stage_code("describe", config), stage_code("preprocess", config)
    kinds = {name for name in described.modules if name.startswith("src/describing/kinds/")}
    assert kinds - {"src/describing/kinds/__init__.py"} == {"src/describing/kinds/text.py"}
    assert not [name for name in described.modules if name.startswith(("src/tracking", "src/data/sets"))]
    assert "torch" not in described.packages
    assert not [name for name in packed.modules if name.startswith("src/describ")]


def test_an_archive_of_the_user_s_is_another_only_if_its_content_is(tmp_path: Path) -> None:
    def key(path: Path, *overrides: str) -> str:
        words = ["experiment=cifar10_resnet", "profile=full", "output=.", f"data.archive={path}", *overrides]
        return archive_fingerprint(compose(words))

    (tmp_path / "here").mkdir()
    first, moved = tmp_path / "a.tar", tmp_path / "here" / "b.tar"
    first.write_bytes(b"archive")
    moved.write_bytes(b"archive")
    before = key(first)
    assert key(moved) == before == key(first, f"data.sha256={sha256_of(first)}")
    first.write_bytes(b"Archive")
    assert key(first) != before
    folder = key(tmp_path / "here")
    moved.write_bytes(b"another archive")
    assert key(tmp_path / "here") != folder


SHA, OTHER = "a" * 64, "b" * 64
OFFICIAL = "data.official={{urls: [{}], sha256: {}}}"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (["data.archive=/a/x.tar", f"data.sha256={SHA}"], ["data.archive=/b/y.tar", f"data.sha256={SHA}"], True),
        (["data.archive=/a/x.tar", f"data.sha256={SHA}"], ["data.archive=/a/x.tar", f"data.sha256={OTHER}"], False),
        (["data.archive=/a/x.tar"], ["data.archive=/b/x.tar"], False),
        ([OFFICIAL.format("https://a/x", SHA)], [OFFICIAL.format("https://b/x,https://a/x", SHA)], True),
        ([OFFICIAL.format("https://a/x", SHA)], [OFFICIAL.format("https://a/x", OTHER)], False),
        ([OFFICIAL.format("https://a/x", "null")], [OFFICIAL.format("https://b/x", "null")], False),
        ([], ["data.val_fraction=0.2"], True),  # one archive serves all packings of it
    ],
)
def test_an_archive_is_another_only_if_its_wanted_sha256_is(first: list[str], second: list[str], same: bool) -> None:
    one, other = (
        archive_fingerprint(compose(["experiment=cifar10_resnet", "profile=full", "output=.", *overrides]))
        for overrides in (first, second)
    )
    assert (one == other) is same
