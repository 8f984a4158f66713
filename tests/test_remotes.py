"""DVC remotes: outputs that one clone pushes and another one pulls are not computed again."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.conftest import commands_environment
from tests.s3 import KEYS, S3

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

# One experiment that takes seconds through all stages.
PARAMS = {
    "profile": "sample",
    "trainer": "cpu",
    "run": {"cifar10_resnet": "cifar10"},
    "data": {"cifar10": {}},
    "experiments": {
        "cifar10_resnet": {
            "overrides": {
                "trainer": {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1},
                "model": {"network": {"width": 8}},
            },
        }
    },
}


def run(folder: Path, *words: str, **environment: str) -> str:
    """The stdout of a command in a repository."""
    variables = commands_environment() | environment
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def commit(folder: Path) -> None:
    run(folder, "git", "add", "--all")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    run(folder, "git", *identity, "commit", "--quiet", "--allow-empty", "-m", "outputs of the pipeline")


@pytest.fixture(scope="module")
def origin(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose pipeline ran and whose outputs are committed."""
    folder = tmp_path_factory.mktemp("origin") / "repository"
    run(clone, "git", "clone", "--quiet", str(clone), str(folder))
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    assert "Running stage 'export@cifar10_resnet'" in run(folder, "dvc", "repro")
    commit(folder)
    return folder


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_a_clone_that_pulls_from_a_remote_runs_no_stage(
    kind: str, origin: Path, s3: S3, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    keys: Mapping[str, str] = {}
    if kind == "directory":
        run(origin, "dvc", "remote", "add", "--force", "--default", "storage", str(tmp_path / "storage"))
    else:
        keys = KEYS
        run(origin, "dvc", "remote", "add", "--force", "--default", "storage", f"{s3.bucket('experiments')}/dvc")
        run(origin, "dvc", "remote", "modify", "storage", "endpointurl", s3.endpoint)
    commit(origin)
    run(origin, "dvc", "push", **keys)
    if kind == "s3":
        assert any(key.startswith("dvc/files/md5/") for key in s3.keys("experiments"))
        committed = (origin / ".dvc" / "config").read_text()
        assert not any(secret in committed for secret in (KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"]))

    other = tmp_path / "other"
    run(origin, "git", "clone", "--quiet", str(origin), str(other))
    run(other, "dvc", "pull", **keys)
    stdout = run(other, "dvc", "repro")
    assert "Running stage" not in stdout
    assert "Data and pipelines are up to date." in stdout
    assert run(other, "git", "status", "--porcelain") == ""
    for name in ("train/model.safetensors", "export/model.onnx"):
        path = Path("experiments", "cifar10_resnet", name)
        assert (other / path).read_bytes() == (origin / path).read_bytes()
