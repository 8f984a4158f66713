"""Direct runs, as real processes: interrupted, resumed, swept, debugged."""

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
LONG = "trainer.max_epochs=12"  # so long that a run told to stop after two epochs has not ended by then


def output_of(text: str) -> Path:
    """The folder that a run says it wrote."""
    found = re.search(r"trained in [\d.]+ s: (\S+)/train", text)
    assert found, text
    return Path(found[1])


def sha256(clone: Path, folder: Path) -> str:
    return json.loads((clone / folder / "train" / "model.json").read_text())["sha256"]


def start(clone: Path, *words: str) -> subprocess.Popen[str]:
    return processes.start(clone, "src.train", *words)


@pytest.fixture(scope="module")
def whole(clone: Path, run: Run) -> str:
    """The sha256 of an uninterrupted run's weights;"""
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, LONG)
    return sha256(clone, output_of(done.stdout))


def test_the_same_run_twice_gives_the_same_bits(whole: str, clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, LONG)
    assert sha256(clone, output_of(done.stdout)) == whole
    other = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, LONG, "seed=1")
    assert sha256(clone, output_of(other.stdout)) != whole


def test_a_second_run_into_a_folder_leaves_its_own_configuration(clone: Path, run: Run) -> None:
    for seed in (3, 4):
        words = ("debug=fast", f"seed={seed}", "hydra.run.dir=experiments/runs/twice")
        run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, *words)
        assert f"seed: {seed}\n" in (clone / "experiments/runs/twice/config.yaml").read_text()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_an_interrupted_run_goes_on_with_the_same_command_to_the_same_bits(
    stop: signal.Signals, whole: str, clone: Path, run: Run
) -> None:
    words = ("+experiment=cifar10_resnet", *SMALL, LONG)
    process = start(clone, *words)
    wait_for(process, r"^epoch 2/12")
    process.send_signal(stop)
    process.wait(60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[stop]
    done = run("python", "-m", "src.train", *words)
    assert "goes on with the run that was interrupted" in done.stdout
    assert "epoch 1/12" not in done.stdout
    folder = output_of(done.stdout)
    assert sha256(clone, folder) == whole
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
def test_a_run_killed_in_mid_epoch_goes_on_with_the_next_batch_to_the_same_bits(
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
    import torch  # noqa: F401  # now: the runs below do not wait until it is there

    before = set(clone.glob("experiments/.work/*/last.ckpt"))
    first = run("python", "-m", "src.train", *words)
    positions = []
    for wanted in (3, 24):  # batches: in the first epoch and in the second
        process = start(clone, *words)
        while batches_done(clone, before) < wanted:
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
    """How far the checkpoint of the one unfinished run that was not there `before` is; 0 while there is none."""
    found = set(clone.glob("experiments/.work/*/last.ckpt")) - before
    if not found:
        return 0
    (path,) = found
    state = torch_load(path)["PackedData"]
    return 20 * state["epoch"] + state["consumed"]


def test_a_signal_in_mid_epoch_saves_the_batch_in_hand(clone: Path, run: Run) -> None:
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
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "SIGTERM: saving, then ending" in said
    (saved,) = set(clone.glob("experiments/.work/*/last.ckpt")) - before
    assert saved.is_file()
    again = start(clone, *words)
    wait_for(again, r"^goes on with the run that was interrupted")
    again.kill()
    again.communicate()


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(clone: Path, run: Run) -> None:
    words = ("+experiment=imdb_lstm", "model.hidden=8", "trainer.limit_train_batches=20", "trainer.max_epochs=3")
    before = set(clone.glob("experiments/.work/*/last.ckpt"))
    done = run(
        "python", "-m", "src.train", *words, "trainer.gradient_clip=null", "model.optimizer.lr=1e38", check=False
    )
    assert done.returncode == 1
    assert "the loss became NaN or infinite in epoch" in done.stderr
    assert "model.optimizer.lr" in done.stderr
    assert "Traceback" not in done.stderr
    for path in set(clone.glob("experiments/.work/*/last.ckpt")) - before:
        assert all(bool(value.isfinite().all()) for value in torch_load(path)["state_dict"].values())


def torch_load(path: Path) -> dict[str, Any]:
    import torch

    return torch.load(path, weights_only=True)


def test_a_checkpoint_of_another_configuration_is_not_resumed(clone: Path, run: Run) -> None:
    process = start(clone, "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=4", "seed=5")
    wait_for(process, r"^epoch 2/4")
    process.kill()
    process.wait(60)
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=4", "seed=6")
    assert "goes on" not in done.stdout
    assert "is not resumed, it is another: seed was 5, is 6. Training starts anew" in done.stdout
    assert "epoch 1/4" in done.stdout


def test_an_interrupted_run_goes_on_in_its_own_mlflow_run(clone: Path, run: Run) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Recorded

    words = ("+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=60", "seed=11")
    database = clone / "experiments" / "mlflow.db"

    def recorded() -> list[Recorded]:
        if not database.exists():
            return []
        client = MlflowClient(f"sqlite:///{database}")
        experiment = client.get_experiment_by_name("cifar10_resnet")
        return list(client.search_runs([experiment.experiment_id], "params.seed = '11'")) if experiment else []

    process = start(clone, *words)
    wait_for(process, r"^epoch 2/60")
    while process.poll() is None and not recorded():
        time.sleep(0.2)
    process.kill()
    assert process.wait(60) == -9  # it was still training
    done = run("python", "-m", "src.train", *words)
    assert "goes on" in done.stdout
    (found,) = recorded()
    assert found.info.status == "FINISHED"
    points = MlflowClient(f"sqlite:///{database}").get_metric_history(found.info.run_id, "val_accuracy")
    assert sorted(point.step for point in points) == list(range(1, 61))


def test_a_second_run_of_the_very_same_thing_is_refused_and_names_the_first(clone: Path, run: Run) -> None:
    words = ("+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=50", "seed=8")
    process = start(clone, *words)
    try:
        wait_for(process, r"^epoch 1/50")
        second = run("python", "-m", "src.train", *words, check=False)
        assert second.returncode == 1
        assert f"process {process.pid}" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
    finally:
        process.kill()
        process.wait(60)


def test_a_sweep_over_seeds_gives_each_run_a_folder(clone: Path, run: Run) -> None:
    done = run(
        "python", "-m", "src.train", "-m", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=1", "seed=0,2,3"
    )
    folders = [Path(found) for found in re.findall(r"trained in [\d.]+ s: (\S+)/train", done.stdout)]
    assert len(set(folders)) == 3
    assert len({sha256(clone, folder) for folder in folders}) == 3


def test_debug_fast_takes_two_batches(clone: Path, run: Run) -> None:
    done = run(
        "python", "-m", "src.train", "+experiment=imdb_lstm", "debug=fast", "model.hidden=8", "model.embedding=8"
    )
    assert "epoch 1/1" in done.stdout


def test_debug_overfit_learns_its_batches_by_heart(clone: Path, run: Run) -> None:
    words = ("data.loader.batch_size=20", "model.network.width=8", "trainer.max_epochs=40", "model.label_smoothing=0")
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", "debug=overfit", *words)
    accuracies = [float(found) for found in re.findall(r"train_accuracy ([\d.]+)", done.stdout)]
    assert accuracies[-1] > 0.95


def test_debug_profile_prints_where_the_time_goes(clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", "debug=profile", *SMALL)
    assert "run_training_batch" in done.stdout + done.stderr


@pytest.mark.long
def test_pix2pix_resumes_to_the_same_bits(clone: Path, run: Run) -> None:
    words = (
        "+experiment=facades_pix2pix",
        "trainer.limit_train_batches=3",
        "trainer.limit_val_batches=1",
        "model.width=4",
        "trainer.max_epochs=4",
        "trainer.threads=1",
    )
    first = sha256(clone, output_of(run("python", "-m", "src.train", *words).stdout))
    process = start(clone, *words)
    wait_for(process, r"^epoch 2/4")
    process.kill()
    process.wait(60)
    done = run("python", "-m", "src.train", *words)
    assert "goes on" in done.stdout
    assert sha256(clone, output_of(done.stdout)) == first


@pytest.mark.parametrize(
    "override",
    [
        "trainer.early_stopping={patience: 1}",
        "trainer.gradient_clip=0.5",
        pytest.param("trainer.compile=true", marks=pytest.mark.long),
    ],
)
def test_options_of_the_trainer_train(override: str, clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=1", override)
    keys = _keys(clone / output_of(done.stdout) / "train" / "model.safetensors")
    assert not [key for key in keys if "_orig_mod" in key]


@pytest.mark.long
def test_attention_pooling_and_least_squares_gan_train(clone: Path, run: Run) -> None:
    tiny = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.max_epochs=1")
    run("python", "-m", "src.train", "+experiment=imdb_lstm", *tiny, "model.pooling=attention", "model.hidden=8")
    run("python", "-m", "src.train", "+experiment=facades_pix2pix", *tiny, "model.gan=lsgan", "model.width=4")


@pytest.mark.long
def test_evaluate_and_export_work_on_a_direct_run(clone: Path, run: Run) -> None:
    done = run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=1", "seed=31")
    folder = output_of(done.stdout)
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"../{folder}", "-cn", "config")
    assert (clone / folder / "metrics.json").is_file()
    assert (clone / folder / "export" / "model.onnx").is_file()


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return list(file.keys())


def test_on_a_terminal_there_is_a_live_bar(clone: Path) -> None:
    """A real pseudo-terminal: the bar redraws, plain lines are for everywhere else."""
    import pty

    main, other = pty.openpty()
    words = [sys.executable, "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=1", "seed=41"]
    environment = commands_environment() | {"TERM": "xterm-256color"}
    process = subprocess.Popen(words, cwd=clone, env=environment, stdin=other, stdout=other, stderr=other)
    os.close(other)
    seen = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait(60) == 0
    text = seen.decode(errors="replace")
    assert "Epoch 0/0" in text
    assert "\x1b[" in text
    assert "epoch 1/1 " not in text
