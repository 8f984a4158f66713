"""The comparison of digests that decides a claim, and the scratch worktree for `verification` and `src.reproduce`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from src.common.errors import Failure
from src.common.git import git, worktree, worktree_environment
from src.tracking.provenance import dirty_patch
from verification import mutants
from verification.claims import Claim, compare
from verification.mutants import Fault
from verification.small_run import stage_outputs

BITS = {"weights": "1234", "optimizer": "5678"}


def test_a_claim_holds_when_all_digests_are_the_same() -> None:
    assert compare("lstm", "twice", dict(BITS), BITS, "weights 1234") == Claim("lstm", "twice", True, "weights 1234")


@pytest.mark.parametrize(
    ("digests", "differing"),
    [
        (BITS | {"weights": "0000"}, "weights"),
        (BITS | {"weights": "0000", "optimizer": "0000"}, "optimizer, weights"),
        ({"weights": "1234"}, "optimizer"),
        (BITS | {"model.onnx": "9"}, "model.onnx"),
    ],
    ids=["one differs", "two differ", "one is missing", "one is too many"],
)
def test_a_claim_is_broken_by_differing_digests_and_names_them(digests: dict[str, str], differing: str) -> None:
    claim = compare("lstm", "twice", digests, BITS, "weights 1234")
    assert (claim.holds, claim.detail) == (False, f"differs: {differing}")


def test_every_output_of_the_stages_in_dvc_yaml_is_compared() -> None:
    expected = {"train/model.safetensors", "train/history.csv", "metrics.json", "evaluation", "export"}
    assert expected <= set(stage_outputs())


# --- planted faults ---------------------------------------------------------------------------------------------------


def test_the_table_of_planted_faults_fits_the_code_and_the_tests() -> None:
    faults = mutants.read_faults()
    assert list(mutants.mismatches(faults)) == []
    assert len(faults) >= 100


def test_a_fault_that_fits_no_more_is_named_and_one_that_no_test_notices_is_told_from_others(tmp_path: Path) -> None:
    (tmp_path / "sums.py").write_text("def total(a, b):\n    return a + b\n\n\nspare = 1\n")
    (tmp_path / "test_sums.py").write_text("from sums import total\n\ndef test_sum():\n    assert total(1, 2) == 3\n")
    wrong, hidden = (
        Fault("sums.py", "a sum", "a + b", "a - b", ("test_sums.py::test_sum",)),
        Fault("sums.py", "a spare", "spare = 1", "spare = 2", ("test_sums.py::test_sum",)),
    )
    assert mutants.plant(wrong, tmp_path)
    assert not mutants.plant(hidden, tmp_path)
    assert "return a + b" in (tmp_path / "sums.py").read_text()
    gone = Fault("sums.py", "gone", "a * b", "a", ("test_sums.py::test_product",))
    assert list(mutants.mismatches([wrong, gone], tmp_path)) == [
        "sums.py: gone: the old text occurs 0 times, not once",
        "sums.py: gone: there is no test test_sums.py::test_product",
    ]


# --- scratch worktrees ------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in which `git` runs in place of this one."""
    folder = tmp_path / "repository"
    (folder / "src").mkdir(parents=True)
    (folder / "src/kept.py").write_text("kept\n")
    (folder / "src/changed.py").write_text("before\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    monkeypatch.setitem(cast(dict[str, Any], git.__kwdefaults__), "cwd", folder)
    return folder


def worktrees(repository: Path) -> list[str]:
    """The worktrees of a repository, itself excluded."""
    return git("worktree", "list", "--porcelain", cwd=repository).split("worktree ")[2:]


def test_a_worktree_holds_the_commit_without_uncommitted_changes(repository: Path) -> None:
    (repository / "src/changed.py").write_text("after\n")
    (repository / "src/new.py").write_text("new\n")
    with worktree("HEAD", "") as folder:
        assert {path.name: path.read_text() for path in folder.glob("*/*.py")} == {
            "kept.py": "kept\n",
            "changed.py": "before\n",
        }
    assert not folder.exists()
    assert worktrees(repository) == []


def test_a_patch_restores_uncommitted_changes_and_new_files(repository: Path) -> None:
    (repository / "src/changed.py").write_text("after\n")
    (repository / "src/kept.py").unlink()
    (repository / "conf").mkdir()
    (repository / "conf" / "new.yaml").write_text("seed: 1\n")
    with worktree("HEAD", dirty_patch(repository)) as folder:
        assert (folder / "src/changed.py").read_text() == "after\n"
        assert (folder / "conf" / "new.yaml").read_text() == "seed: 1\n"
        assert not (folder / "src/kept.py").exists()
        (folder / "src/kept.py").write_text("of the worktree\n")
    assert not (repository / "src/kept.py").exists()  # the worktree does not write into the repository


def test_a_patch_leaves_out_files_too_large_to_record(repository: Path) -> None:
    (repository / "src" / "large.py").write_bytes(bytes(2_000_000))
    with worktree("HEAD", dirty_patch(repository)) as folder:
        assert not (folder / "src" / "large.py").exists()
        assert (folder / "src/kept.py").exists()


def test_a_worktree_is_removed_after_a_failure(repository: Path) -> None:
    with pytest.raises(ZeroDivisionError), worktree("HEAD", "") as folder:
        1 / 0  # noqa: B018
    assert not folder.exists()
    assert worktrees(repository) == []


def test_an_unknown_commit_is_refused_in_one_line(repository: Path) -> None:
    with (
        pytest.raises(Failure, match=r"^git worktree failed: .*no-such-commit") as caught,
        worktree("no-such-commit", ""),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert worktrees(repository) == []


def test_a_patch_that_does_not_apply_is_refused_and_leaves_no_worktree(repository: Path) -> None:
    (repository / "src/changed.py").write_text("after\n")
    patch = dirty_patch(repository).replace("-before", "-something else")
    with pytest.raises(Failure, match=r"^git apply failed: .*src/changed\.py"), worktree("HEAD", patch):
        pass
    assert worktrees(repository) == []


def test_a_command_in_a_worktree_has_its_own_mlflow_store_and_no_dvc_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train@imdb_lstm")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    variables = worktree_environment(tmp_path)
    assert variables["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/experiments/mlflow.db"
    assert "DVC_STAGE" not in variables
    assert "PATH" in variables
