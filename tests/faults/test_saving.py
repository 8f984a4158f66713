"""Incomplete and damaged files: kills during a save, full disks, truncation, flipped bits; messages and remedies."""

from __future__ import annotations

import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from src.common.files import sha256_of
from tests.faults.commands import (
    Damage,
    clone_of,
    copy,
    flip_a_bit,
    output_of,
    refusal,
    run,
    started,
    truncate,
)
from tests.loopback import Host
from tests.tiny_data import cifar_members, write_tar
from verification.interruption import digests, wait_for_checkpoint, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

# Quick to train, with checkpoints of 20 MB (a wide embedding), whose writing takes long enough to be interrupted.
SMALL = (
    "model.hidden=8",
    "model.embedding=64",
    "data.loader.batch_size=20",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=10",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.threads=1",
    "trainer.checkpoint_seconds=0",
    "export.latency_seconds=0.05",
)
TRAIN = ("python", "-m", "src.train", "+experiment=imdb_lstm", *SMALL)
DATA = Path("data/processed/sample/imdb")  # prepared by commands here, DVC's output in the pipeline
RAW = Path("data/raw/sample/imdb")
REVIEW = "A film that I would see again."

damages = pytest.mark.parametrize(
    "damage", [pytest.param(truncate, marks=pytest.mark.long), flip_a_bit], ids=["truncated", "with a flipped bit"]
)


@pytest.fixture(scope="module")
def original(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with prepared data and one complete run, trained and exported."""
    folder = clone_of(clone, tmp_path_factory.mktemp("saving") / "original")
    for stage in ("download", "preprocess"):
        run(folder, "python", "-m", f"src.{stage}", "+experiment=imdb_lstm")
    output = output_of(run(folder, *TRAIN).stdout)
    run(folder, *on("export", output))
    return folder


@pytest.fixture(scope="module")
def output(original: Path) -> str:
    """The folder of the complete run."""
    (note,) = original.glob("experiments/runs/imdb_lstm/*/train/model.json")
    return note.parents[1].relative_to(original).as_posix()


@pytest.fixture
def repository(original: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return copy(original, tmp_path / "repository")


def on(stage: str, output: str) -> tuple[str, ...]:
    """The command of a stage for a run's folder."""
    return "python", "-m", f"src.{stage}", "-cp", f"../{output}", "-cn", "config"


def interrupted(repository: Path, *words: str) -> Path:
    """Stops a training with SIGTERM after its first checkpoint; returns the checkpoint's path."""
    with started(repository, *TRAIN, *words) as process:
        checkpoint = wait_for_checkpoint(repository, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    return checkpoint


def assert_same_run(repository: Path, stdout: str, output: str) -> None:
    """Asserts that a training wrote the same bytes as the original one."""
    assert digests(repository / output_of(stdout) / "train") == digests(repository / output / "train")


# --- killed during a save ---------------------------------------------------------------------------------------------


def test_a_kill_during_a_save_keeps_the_previous_checkpoint(repository: Path, output: str) -> None:
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == repository.stat().st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=shared_memory) as tmpdir:
        with started(repository, *TRAIN, TMPDIR=tmpdir) as process:
            checkpoint = wait_for_checkpoint(repository, process)
            temporary = checkpoint.with_name(f".{checkpoint.name}.{process.pid}")
            wait_until(temporary.exists, process)
            process.kill()
        assert temporary.exists()  # killed during the save
        assert sha256_of(checkpoint) in checkpoint.with_name("last.ckpt.sha256").read_text().split()
        done = run(repository, *TRAIN, TMPDIR=tmpdir)
        assert "goes on with the run that was interrupted" in done.stdout
        assert_same_run(repository, done.stdout, output)
        assert not list(checkpoint.parent.glob("*.ckpt*"))
        assert not [path for path in Path(tmpdir).rglob("*") if path.is_file()]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_training_and_keeps_the_last_checkpoint(repository: Path, output: str) -> None:
    checkpoint = interrupted(repository)
    before = sha256_of(checkpoint)
    message = refusal(run(repository, *TRAIN, check=False, room=8_000_000), "train")
    assert f"no room to write {checkpoint} " in message
    assert "free some space and run the same command again" in message
    assert sha256_of(checkpoint) == before
    assert not list(checkpoint.parent.glob(".last*"))
    done = run(repository, *TRAIN)
    assert "goes on with the run that was interrupted" in done.stdout
    assert_same_run(repository, done.stdout, output)


def test_a_full_disk_stops_a_download_which_is_then_resumed(repository: Path, tmp_path: Path) -> None:
    archive, room = write_tar(tmp_path / "c.tar", cifar_members()), 50_000
    with Host() as host:
        url = host.serve("/c.tar", archive.read_bytes())
        source = ("profile=full", f"data.archive={url}", f"data.sha256={sha256_of(archive)}")
        words = ("python", "-m", "src.download", "+experiment=cifar10_resnet", *source)
        message = refusal(run(repository, *words, check=False, room=room, NO_PROXY="127.0.0.1"), "download")
        assert "no room to write " in message
        assert "free some space and run again" in message
        raw = repository / "data" / "raw" / "full" / "cifar10"
        assert not list(raw.iterdir())
        (part,) = (repository / "data" / ".partial").glob("*.partial")
        assert part.stat().st_size == room
        run(repository, *words, NO_PROXY="127.0.0.1")
        assert host.requests[-1].headers["Range"] == f"bytes={room}-"
    assert sha256_of(raw / "cifar-10-binary.tar.gz") == sha256_of(archive)


@pytest.mark.long
def test_a_full_disk_stops_packing_and_leaves_no_incomplete_split(repository: Path) -> None:
    words = ("python", "-m", "src.preprocess", "+experiment=imdb_lstm")
    expected = digests(repository / DATA)
    shutil.rmtree(repository / DATA)
    message = refusal(run(repository, *words, check=False, room=1_000_000), "preprocess")
    assert f"no room to write {repository / DATA / 'train.safetensors'} " in message
    assert "free some space and run the same command again" in message
    assert digests(repository / DATA) == {}
    run(repository, *words)
    assert digests(repository / DATA) == expected


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@damages
def test_a_damaged_checkpoint_is_discarded_and_training_restarts(damage: Damage, repository: Path, output: str) -> None:
    checkpoint = interrupted(repository)
    damage(checkpoint)
    done = run(repository, *TRAIN)
    assert f"{checkpoint} is damaged (its sha256 differs): not resumed, training starts anew" in done.stdout
    assert "goes on" not in done.stdout
    assert_same_run(repository, done.stdout, output)


@pytest.mark.long
def test_a_damaged_best_checkpoint_is_refused_with_keep_best(repository: Path) -> None:
    # This rate changes no weight: the first epoch stays the best.
    words = ("trainer.keep=best", "model.optimizer.lr=1e-30", "trainer.max_epochs=4")
    with started(repository, *TRAIN, *words) as process:
        last = wait_for_checkpoint(repository, process)
        best = last.with_name("best.ckpt")
        wait_until(best.exists, process)
        wait_for_checkpoint(repository, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    flip_a_bit(best)
    message = refusal(run(repository, *TRAIN, *words, check=False), "train")
    assert f"{best} is damaged (its sha256 differs): delete {best.parent} and train again" in message
    shutil.rmtree(best.parent)
    assert "goes on" not in run(repository, *TRAIN, *words).stdout


@pytest.mark.parametrize(
    ("damage", "stage"),
    [
        pytest.param(truncate, "evaluate", marks=pytest.mark.long),
        pytest.param(flip_a_bit, "evaluate", marks=pytest.mark.long),
        pytest.param(flip_a_bit, "export", marks=pytest.mark.long),
    ],
    ids=["truncated, evaluate", "with a flipped bit, evaluate", "with a flipped bit, export"],
)
def test_damaged_weights_are_refused_until_retrained(damage: Damage, stage: str, repository: Path, output: str) -> None:
    weights = repository / output / "train" / "model.safetensors"
    sound = sha256_of(weights)
    exported = digests(repository / output / "export")
    damage(weights)
    message = refusal(run(repository, *on(stage, output), check=False), stage)
    assert f"{weights} is damaged (sha256 {sha256_of(weights)[:12]}…, {sound[:12]}… was written)" in message
    assert "delete it and train again" in message
    assert not (repository / output / "metrics.json").exists()
    assert digests(repository / output / "export") == exported
    retrained = output_of(run(repository, *TRAIN).stdout)
    assert sha256_of(repository / retrained / "train" / "model.safetensors") == sound
    run(repository, *on(stage, retrained))


@pytest.mark.long
@damages
def test_a_damaged_onnx_model_is_refused_until_exported_again(damage: Damage, repository: Path, output: str) -> None:
    words = ("python", "-m", "src.predict", f"{output}/export", REVIEW)
    answer = run(repository, *words).stdout
    graph = repository / output / "export" / "model.onnx"
    sound = sha256_of(graph)
    damage(graph)
    message = refusal(run(repository, *words, check=False), "predict")
    assert f"{output}/export holds no exported model that is whole" in message
    assert "model.onnx is damaged" in message
    assert "export again" in message
    run(repository, *on("export", output))
    assert sha256_of(graph) == sound
    assert run(repository, *words).stdout == answer


@pytest.mark.long
@damages
def test_a_damaged_packed_split_is_refused_until_packed_again(damage: Damage, repository: Path, output: str) -> None:
    split = repository / DATA / "train.safetensors"
    damage(split)
    message = refusal(run(repository, *TRAIN, check=False), "train")
    assert f"{split} is damaged (sha256 {sha256_of(split)[:12]}…, " in message
    assert f"delete {repository / DATA} and run `dvc repro`, or the `python -m src.train` again" in message
    shutil.rmtree(repository / DATA)
    assert_same_run(repository, run(repository, *TRAIN).stdout, output)


@damages
def test_a_damaged_raw_archive_is_refused_until_downloaded_again(damage: Damage, repository: Path) -> None:
    archive = repository / RAW / "aclImdb_v1.tar.gz"
    expected = digests(repository / DATA)
    damage(archive)
    words = ("python", "-m", "src.preprocess", "+experiment=imdb_lstm")
    message = refusal(run(repository, *words, check=False), "preprocess")
    assert f"{archive} is missing or damaged: delete {repository / RAW} and run `dvc repro`" in message
    assert digests(repository / DATA) == expected
    shutil.rmtree(repository / RAW)
    shutil.rmtree(repository / DATA)
    run(repository, "python", "-m", "src.download", "+experiment=imdb_lstm")
    run(repository, *words)
    assert digests(repository / DATA) == expected


@pytest.mark.long
@damages
def test_a_damaged_user_archive_is_refused_until_a_sound_one_is_named(
    damage: Damage, repository: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "mine.tar.gz"
    shutil.copyfile(repository / RAW / "aclImdb_v1.tar.gz", archive)
    damage(archive)
    words = (*TRAIN, "profile=full", f"data.archive={archive}", "trainer.max_epochs=1")
    done = run(repository, *words, check=False)
    assert "aclImdb_v1.tar.gz is truncated, damaged or no archive (" in refusal(done, "train")
    assert "data.archive=PATH of a sound copy" in done.stderr
    assert not list(repository.glob("data/direct/*/processed/full/imdb/*"))
    shutil.copyfile(repository / RAW / "aclImdb_v1.tar.gz", archive)
    assert output_of(run(repository, *words).stdout)
