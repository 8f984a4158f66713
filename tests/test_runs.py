"""Direct runs as real processes: interruption and resume, multirun, debug modes, options of the trainer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.conftest import Run, commands_environment
from tests.processes import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# A few real steps: five batches of 100 images, a narrow network.
SMALL = (
    "data.loader.batch_size=100",
    "trainer.limit_train_batches=5",
    "trainer.limit_val_batches=1",
    "model.network.width=8",
    "trainer.threads=1",
)
LONG = "trainer.max_epochs=12"  # long enough that a run stopped after two epochs is unfinished


def output_of(text: str) -> Path:
    """The folder that a run wrote, relative to the clone."""
    match = re.search(r"trained in [\d.]+ s: (\S+)/train", text)
    assert match, text
    return Path(match[1])


def sha256(clone: Path, folder: Path) -> str:
    return json.loads((clone / folder / "train" / "model.json").read_text())["sha256"]


def start(clone: Path, *words: str) -> subprocess.Popen[str]:
    return processes.start(clone, "src.train", *words)


@pytest.fixture(scope="module")
def uninterrupted(clone: Path, run: Run) -> str:
    """The sha256 of the weights of an uninterrupted run."""
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, LONG)
    return sha256(clone, output_of(done.stdout))


def test_the_same_run_twice_gives_the_same_bits(uninterrupted: str, clone: Path, run: Run) -> None:
    # With -B it is not forked from tests/fork_server.py, so that it has another hash seed.
    done = run("python", "-B", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, LONG)
    assert sha256(clone, output_of(done.stdout)) == uninterrupted
    other = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, LONG, "seed=1")
    assert sha256(clone, output_of(other.stdout)) != uninterrupted


def test_a_second_run_into_a_folder_replaces_its_configuration(clone: Path, run: Run) -> None:
    for seed in (3, 4):
        words = ("debug=fast", f"seed={seed}", "hydra.run.dir=experiments/runs/twice")
        run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, *words)
        assert f"seed: {seed}\n" in (clone / "experiments/runs/twice/config.yaml").read_text()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_an_interrupted_run_is_resumed_to_the_same_bits(
    stop: signal.Signals, uninterrupted: str, clone: Path, run: Run
) -> None:
    words = ("+experiment=cifar10_resnet", *SMALL, LONG, "trainer.checkpoint_seconds=0")
    process = start(clone, *words)
    wait_for(process, r"^epoch 2/12")
    process.send_signal(stop)
    process.wait(60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[stop]
    done = run("python", "-m", "src.train", *words)
    assert "goes on with the run that was interrupted" in done.stdout
    assert "epoch 1/12" not in done.stdout
    folder = output_of(done.stdout)
    assert sha256(clone, folder) == uninterrupted
    history = (clone / folder / "train" / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history] == ["epoch", *map(str, range(1, 13))]


@pytest.mark.long
@pytest.mark.parametrize(
    ("experiment", "narrow"),
    [
        ("cifar10_resnet", "model.network.width=8"),
        ("imdb_lstm", "model.hidden=8"),
        ("facades_pix2pix", "model.width=4"),
    ],
)
def test_a_run_killed_within_an_epoch_is_resumed_to_the_same_bits(
    experiment: str, narrow: str, clone: Path, run: Run
) -> None:
    words = (
        f"+experiment={experiment}",
        narrow,
        "data.loader.batch_size=20",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=20",
        "trainer.limit_val_batches=1",
        "trainer.checkpoint_seconds=0",
        "trainer.threads=1",
    )
    import torch  # noqa: F401  # before the runs: loading it takes longer than they train

    before = set(clone.glob("experiments/.work/*/last.ckpt"))
    first = run("python", "-m", "src.train", *words)
    positions = []
    for target in (3, 24):  # batches: in the first epoch and in the second
        process = start(clone, *words)
        while batches_done(clone, before) < target:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
        positions.append(batches_done(clone, before))
    assert 3 <= positions[0] < 20 < positions[1] < 40
    done = run("python", "-m", "src.train", *words)
    assert "goes on with the run that was interrupted" in done.stdout
    folders = [clone / output_of(text) / "train" for text in (first.stdout, done.stdout)]
    for name in ("model.safetensors", "model.json", "history.csv", "metrics.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def batches_done(clone: Path, before: set[Path]) -> int:
    """The batches in the checkpoint of the unfinished run that started after `before`; 0 without one."""
    checkpoints = set(clone.glob("experiments/.work/*/last.ckpt")) - before
    if not checkpoints:
        return 0
    (path,) = checkpoints
    state = torch_load(path)["PackedData"]
    return 20 * state["epoch"] + state["consumed"]


def test_sigterm_within_an_epoch_saves_a_checkpoint(clone: Path, run: Run) -> None:
    words = (
        "+experiment=cifar10_resnet",
        *SMALL,
        "trainer.limit_train_batches=22",
        "trainer.max_epochs=100",
        "seed=51",
    )
    before = set(clone.glob("experiments/.work/*/last.ckpt"))
    process = start(clone, *words)
    wait_for(process, r"^epoch 1/100")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "SIGTERM: saving, then ending" in output
    (saved,) = set(clone.glob("experiments/.work/*/last.ckpt")) - before
    assert saved.is_file()
    resumed = start(clone, *words)
    wait_for(resumed, r"^goes on with the run that was interrupted")
    resumed.kill()
    resumed.communicate()


def test_a_non_finite_loss_stops_the_run_and_saves_no_checkpoint_with_it(clone: Path, run: Run) -> None:
    words = ("+experiment=imdb_lstm", "model.hidden=8", "trainer.limit_train_batches=20", "trainer.max_epochs=3")
    before = set(clone.glob("experiments/.work/*/last.ckpt"))
    done = run(
        "python", "-m", "src.train", *words, "trainer.gradient_clip=null", "model.optimizer.lr=1e38", check=False
    )
    assert done.returncode == 1
    assert "became NaN or infinite in epoch" in done.stderr
    assert "model.optimizer.lr" in done.stderr
    assert "Traceback" not in done.stderr
    for path in set(clone.glob("experiments/.work/*/last.ckpt")) - before:
        assert all(bool(value.isfinite().all()) for value in torch_load(path)["state_dict"].values())


def torch_load(path: Path) -> dict[str, Any]:
    import torch

    return torch.load(path, weights_only=True)


def test_a_checkpoint_of_another_configuration_is_not_resumed(clone: Path, run: Run) -> None:
    every_batch = ("trainer.max_epochs=4", "trainer.checkpoint_seconds=0")
    process = start(clone, "+experiment=cifar10_resnet", *SMALL, *every_batch, "seed=5")
    wait_for(process, r"^epoch 2/4")
    process.kill()
    process.wait(60)
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, *every_batch, "seed=6")
    assert "goes on" not in done.stdout
    assert "is not resumed, it is another: seed was 5, is 6. Training starts anew" in done.stdout
    assert "epoch 1/4" in done.stdout


def test_an_interrupted_run_is_resumed_in_its_mlflow_run(clone: Path, run: Run) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Run as TrackedRun

    words = ("+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=30", "trainer.checkpoint_seconds=0", "seed=11")
    database = clone / "experiments" / "mlflow.db"

    def tracked_runs() -> list[TrackedRun]:
        if not database.exists():
            return []
        client = MlflowClient(f"sqlite:///{database}")
        experiment = client.get_experiment_by_name("cifar10_resnet")
        return list(client.search_runs([experiment.experiment_id], "params.seed = '11'")) if experiment else []

    process = start(clone, *words)
    wait_for(process, r"^epoch 2/30")
    while process.poll() is None and not tracked_runs():
        time.sleep(0.2)
    process.kill()
    assert process.wait(60) == -9  # killed during training
    done = run("python", "-m", "src.train", *words)
    assert "goes on" in done.stdout
    (tracked,) = tracked_runs()
    assert tracked.info.status == "FINISHED"
    points = MlflowClient(f"sqlite:///{database}").get_metric_history(tracked.info.run_id, "val_accuracy")
    assert sorted(point.step for point in points) == list(range(1, 31))


def test_a_multirun_trains_the_runs_after_a_failed_one(clone: Path, run: Run) -> None:
    words = ("+experiment=mnist_mlp,mnist_cnn", "debug=fast", "trainer.limit_train_batches=4", "seed=0,1")
    done = run("python", "-m", "src.train", "-m", *words, "model.optimizer.lr=1e38,0.001", check=False)
    assert done.returncode == 1
    folders = [Path(folder) for folder in re.findall(r"trained in [\d.]+ s: (\S+)/train", done.stdout)]
    assert [folder.parent.parent.name for folder in folders] == ["mnist_mlp", "mnist_mlp", "mnist_cnn", "mnist_cnn"]
    assert len({sha256(clone, folder) for folder in folders}) == 4
    assert len(re.findall(r"^  .*lr=1e\+38 +failed: .*NaN", done.stdout, re.MULTILINE)) == 4
    (command,) = re.findall(r"^compare them: (.*)$", done.stdout, re.MULTILINE)
    compared = run(*command.split())
    assert "mnist_mlp" in compared.stdout
    assert "mnist_cnn" in compared.stdout


def test_debug_fast_trains_one_epoch(clone: Path, run: Run) -> None:
    done = run(
        "python", "-m", "src.train", "+experiment=imdb_lstm", "debug=fast", "model.hidden=8", "model.embedding=8"
    )
    assert "epoch 1/1" in done.stdout


def test_debug_overfit_memorizes_its_batches(clone: Path, run: Run) -> None:
    words = ("data.loader.batch_size=20", "model.network.width=8", "trainer.max_epochs=40", "model.label_smoothing=0")
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", "debug=overfit", *words)
    accuracies = [float(value) for value in re.findall(r"train_accuracy ([\d.]+)", done.stdout)]
    assert accuracies[-1] > 0.95


def test_debug_profile_prints_a_profile(clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", "debug=profile", *SMALL)
    assert "run_training_batch" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "override",
    [
        "trainer.early_stopping={patience: 1}",
        "trainer.gradient_clip=0.5",
        pytest.param("trainer.compile=true", marks=pytest.mark.long),
    ],
)
def test_options_of_the_trainer_work(override: str, clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=1", override)
    keys = _keys(clone / output_of(done.stdout) / "train" / "model.safetensors")
    assert not [key for key in keys if "_orig_mod" in key]


@pytest.mark.long
def test_options_of_the_models_work(clone: Path, run: Run) -> None:
    tiny = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.max_epochs=1")
    run("python", "-m", "src.train", "+experiment=imdb_lstm", *tiny, "model.pooling=attention", "model.hidden=8")
    run("python", "-m", "src.train", "+experiment=facades_pix2pix", *tiny, "model.gan=lsgan", "model.width=4")


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return list(file.keys())


def test_a_terminal_shows_a_progress_bar(clone: Path) -> None:
    """In a pseudo-terminal a bar is redrawn; elsewhere plain lines are printed."""
    import pty

    main, other = pty.openpty()
    words = [sys.executable, "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=1", "seed=41"]
    environment = commands_environment() | {"TERM": "xterm-256color"}
    process = subprocess.Popen(words, cwd=clone, env=environment, stdin=other, stdout=other, stderr=other)
    os.close(other)
    output = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(60) == 0
    text = output.decode(errors="replace")
    assert "Epoch 0/0" in text
    assert "\x1b[" in text
    assert "epoch 1/1 " not in text
