"""Malicious archives, checkpoints and configurations, given to the real commands: refused, never executed."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.configuration.composing import compose, write_resolved
from src.configuration.schema import Config
from src.data.fetching import obtaining
from src.data.fetching.files import SourceError
from src.download import download
from src.preprocess import preprocess
from tests.conftest import Run, commands_environment
from tests.processes import wait_for
from tests.test_archives import tar_bytes, tar_member, zip_bytes, zip_member
from tests.test_runs import LONG, SMALL, start
from tests.tiny_data import cifar_members

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

INTERRUPTED = ("+experiment=cifar10_resnet", *SMALL, LONG, "trainer.checkpoint_seconds=0", "seed=91")
CIFAR = ("+experiment=cifar10_resnet", "profile=full")
MEBIBYTE = 1 << 20


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A path outside of the repository that the malicious content would create."""
    return tmp_path / "outside" / "canary"


def status(clone: Path) -> str:
    return subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True).stdout


# --- archives ---------------------------------------------------------------------------------------------------------


def tar(*members: Any) -> bytes:
    """A sound archive in the official layout, with extra members at its end."""
    return tar_bytes(*cifar_members().items(), *members)


def zipped(*members: Any) -> bytes:
    return zip_bytes(*cifar_members().items(), *members)


def climbing(path: Path) -> str:
    return "../" * 30 + str(path)[1:]


def link(path: Path) -> tuple[Any, ...]:
    """A link to the folder outside, and a file to be written through it."""
    return tar_member("top/link", type=tarfile.SYMTYPE, linkname=str(path.parent)), ("top/link/canary", b"x")


ARCHIVES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "tar-climbs": (lambda path: tar((climbing(path), b"x")), "has a name that leads out of the archive"),
    "tar-absolute": (lambda path: tar((str(path), b"x")), "has a name that leads out of the archive"),
    "tar-symlink": (lambda path: tar(*link(path)), "'top/link' is a symbolic link"),
    "tar-hard-link": (
        lambda path: tar(tar_member("top/link", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
        "'top/link' is a hard link",
    ),
    "tar-device": (
        lambda path: tar(tar_member("top/zero", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
        "'top/zero' is a device",
    ),
    "tar-fifo": (lambda path: tar(tar_member("top/pipe", type=tarfile.FIFOTYPE)), "'top/pipe' is a device, fifo"),
    "zip-climbs": (lambda path: zipped((climbing(path), b"x")), "has a name that leads out of the archive"),
    "zip-absolute": (lambda path: zipped((str(path), b"x")), "has a name that leads out of the archive"),
    "zip-backslash": (lambda path: zipped(("..\\..\\canary", b"x")), "has a name that leads out of the archive"),
    "zip-symlink": (
        lambda path: zipped((zip_member("top/link", stat.S_IFLNK | 0o777), str(path.parent).encode())),
        "'top/link' is a symbolic link",
    ),
    "zip-device": (
        lambda path: zipped((zip_member("top/zero", stat.S_IFCHR | 0o666), b"")),
        "'top/zero' is a device",
    ),
}


@pytest.fixture(autouse=True)
def clean(clone: Path) -> Iterator[None]:
    """Removes the data of the full profile after each test."""
    yield
    for kind in ("raw", "processed"):
        shutil.rmtree(clone / "data" / kind / "full", ignore_errors=True)


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_malicious_archive_is_refused_and_writes_no_file(
    name: str, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obtaining, "ROOT", tmp_path)
    build, message = ARCHIVES[name]
    canary.parent.mkdir()
    archive = tmp_path / "mine"
    archive.write_bytes(build(canary))
    data = cifar().data.model_copy(update={"archive": str(archive)})
    config = cifar().model_copy(update={"data": data, "data_folder": str(tmp_path / "data")})
    download(config)
    with pytest.raises(SourceError) as error:
        preprocess(config)
    assert str(error.value).startswith(f"{config.raw}/cifar-10-binary.tar.gz: member '")
    assert message in str(error.value)
    assert str(error.value).endswith("do not trust this archive, get it from another source")
    assert list(canary.parent.iterdir()) == []
    assert not list(config.processed.glob("*"))


@functools.cache
def cifar() -> Config:
    return compose(["experiment=cifar10_resnet", "profile=full", "output=out"])


def tar_bomb() -> bytes:
    """3 MB of gzip that expand to 30 members, 3 GB of zeros; one compressed block of zeros is repeated."""
    zeros = gzip.compress(bytes(100 * MEBIBYTE), 9)
    members = [
        gzip.compress(tar_member(f"cifar/data_batch_{i}.bin", size=100 * MEBIBYTE).tobuf()) + zeros for i in range(30)
    ]
    return b"".join(members) + gzip.compress(bytes(1024))


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"cifar/data_batch_{i}.bin", bytes(100 * MEBIBYTE))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tar_bomb, "'cifar/data_batch_2.bin' brings the content to more than the"),
        (zip_bomb, "'cifar/data_batch_2.bin' brings the content to more than the"),
        (lambda: tar_member("cifar/data_batch_1.bin", size=1 << 40).tobuf(), "declares 1,099,511,627,776 bytes"),
    ],
    ids=["tar", "zip", "declared"],
)
def test_a_bomb_is_refused_within_2_gib_of_memory(
    build: Callable[[], bytes], message: str, clone: Path, run: Run, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb"
    bomb.write_bytes(build())
    assert bomb.stat().st_size < 4e6
    run("python", "-m", "src.download", *CIFAR, f"data.archive={bomb}")
    done = subprocess.run(
        [sys.executable, "-m", "src.preprocess", *CIFAR, f"data.archive={bomb}"],
        cwd=clone,
        env=commands_environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("preprocess failed: ") and message in line


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write_pickle(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps({"state_dict": payload}, protocol=2))


def write_torch(path: Path, payload: Payload) -> None:
    import torch

    torch.save({"state_dict": payload}, path)


@pytest.fixture(scope="module")
def unfinished(clone: Path) -> Path:
    """The checkpoint of a run that was killed after its second epoch."""
    before = set(clone.glob("experiments/.work/*/last.ckpt"))
    process = start(clone, *INTERRUPTED)
    wait_for(process, r"^epoch 3/12")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (path,) = set(clone.glob("experiments/.work/*/last.ckpt")) - before
    return path


@pytest.mark.parametrize("write", [write_pickle, write_torch], ids=["pickle", "torch"])
def test_a_malicious_checkpoint_is_refused_and_not_executed(
    write: Callable[[Path, Payload], None], unfinished: Path, canary: Path, run: Run
) -> None:
    canary.parent.mkdir()
    write(unfinished, Payload(canary))
    load_unsafely(unfinished)
    canary.rmdir()  # created: the payload works
    digest = hashlib.sha256(unfinished.read_bytes()).hexdigest()
    unfinished.with_name("last.ckpt.sha256").write_text(digest)  # as the run would save it
    done = run("python", "-m", "src.train", *INTERRUPTED, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"train failed: {unfinished} is no training's state (UnpicklingError; nothing in it was run)"
    )
    assert line.endswith(f"delete {unfinished.parent} and train again")
    assert not canary.exists()


def test_a_checkpoint_with_another_digest_is_not_read(unfinished: Path, canary: Path, run: Run) -> None:
    canary.parent.mkdir()
    write_pickle(unfinished, Payload(canary))
    unfinished.with_name("last.ckpt.sha256").write_text("0" * 64)
    done = run("python", "-m", "src.train", *INTERRUPTED)
    assert f"{unfinished} is damaged (its sha256 differs): not resumed, training starts anew" in done.stdout
    assert "epoch 1/12" in done.stdout
    assert not canary.exists()
    assert not unfinished.exists()


def load_unsafely(path: Path) -> None:
    """Unpickles a file, as the project never does."""
    import torch

    with contextlib.suppress(RuntimeError):  # raised for a plain pickle, after it was executed
        torch.load(path, weights_only=False)


# --- configurations ---------------------------------------------------------------------------------------------------

EVIL = "evil_module.Model"


@pytest.fixture
def evil(canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Path:
    """An importable module that creates the canary on import."""
    modules = tmp_path / "modules"
    modules.mkdir()
    canary.parent.mkdir()
    (modules / "evil_module.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Model: pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(modules))
    run("python", "-c", "import evil_module")
    canary.unlink()  # created: the import works
    return canary


def assert_refused(done: subprocess.CompletedProcess[str], canary: Path, message: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert all(line.startswith("configuration refused: ") for line in done.stderr.splitlines())
    assert message in done.stderr
    assert not canary.exists()


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("train", f"model._target_={EVIL}", f"model._target_: {EVIL!r} is not allowed: only src.data.* and"),
        ("train", f"data._target_={EVIL}", f"data._target_: {EVIL!r} is not allowed"),
        ("train", f"model.network={{_target_: {EVIL}}}", f"model.network._target_: {EVIL!r} is not allowed"),
        (
            "train",
            f"model.optimizer._target_={EVIL}",
            f"model.optimizer._target_: {EVIL!r} is not allowed: only torch.optim",
        ),
        ("train", f"+callback._target_={EVIL}", "callback: unknown key"),
        ("download", f"data._target_={EVIL}", f"data._target_: {EVIL!r} is not allowed"),
        ("train", "model._target_=os.system", "model._target_: 'os.system' is not allowed"),
        # Hydra's own section, which Hydra reads before the project's checks.
        ("train", f"+hydra.callbacks.x._target_={EVIL}", f"hydra.callbacks.x._target_: {EVIL!r} is not allowed"),
        ("train", f"hydra.sweeper._target_={EVIL}", f"hydra.sweeper._target_: {EVIL!r} is not allowed"),
        ("train", f"hydra.job_logging.handlers.console.class={EVIL}", "hydra.job_logging: is not allowed"),
        ("train", "+hydra.job.env_set.GIT_CONFIG_COUNT=1", "hydra.job.env_set: is not allowed"),
    ],
)
def test_a_malicious_target_on_the_command_line_is_refused_unimported(
    stage: str, override: str, message: str, evil: Path, clone: Path, run: Run
) -> None:
    def runs() -> list[Path]:
        return sorted(clone.glob("experiments/runs/*/*"))

    before = runs()
    done = run("python", "-m", f"src.{stage}", "+experiment=cifar10_resnet", override, check=False)
    assert_refused(done, evil, message)
    assert runs() == before


@pytest.mark.parametrize("stage", ["download", "preprocess", "train", "evaluate", "export"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data", "_target_"], f"data._target_: {EVIL!r} is not allowed"),
        (["hydra", "callbacks", "x", "_target_"], f"hydra.callbacks.x._target_: {EVIL!r} is not allowed"),
    ],
    ids=["data", "hydra"],
)
def test_a_malicious_target_in_a_file_is_refused_by_every_stage(
    keys: list[str], message: str, stage: str, evil: Path, run: Run, tmp_path: Path
) -> None:
    content = compose(["experiment=cifar10_resnet", f"output={tmp_path}/out"]).plain()
    content["hydra"] = {"run": {"dir": "."}, "output_subdir": None}  # as in every resolved file
    section = content
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = EVIL
    write_resolved(tmp_path / "config.yaml", content)
    assert_refused(
        run("python", "-m", f"src.{stage}", "-cp", str(tmp_path), "-cn", "config", check=False), evil, message
    )


def test_a_malicious_target_in_params_yaml_is_refused_by_compose(evil: Path, clone: Path, run: Run) -> None:
    path = clone / "params.yaml"
    sound = path.read_text()
    params = yaml.safe_load(sound)
    params["experiments"]["imdb_lstm"]["overrides"]["model"]["_target_"] = EVIL
    path.write_text(yaml.safe_dump(params))
    try:
        done = run("python", "-m", "src.compose", "experiment", "imdb_lstm", check=False)
    finally:
        path.write_text(sound)
    assert_refused(done, evil, f"model._target_: {EVIL!r} is not allowed")
    assert status(clone) == ""
