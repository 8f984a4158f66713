"""One model on several processes: started by the run itself, by torchrun, by srun, on two nodes, in a sweep."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from src.common.errors import ConfigError
from src.configuration.composing import check, compose
from src.configuration.schema import Config
from src.data import packed
from src.training import launcher
from tests import processes
from tests.conftest import Run, commands_environment
from tests.processes import wait_for
from tests.test_runs import SMALL, output_of, sha256, start
from tests.tiny_data import noise_digits

pytestmark = [pytest.mark.timeout(600)]

# The complete validation split in several batches, the last one of a single example.
UNEVEN = ("trainer.limit_val_batches=null", "trainer.precision=32", "data.loader.eval_batch_size={size}")
FOLLOWER = "src.training.follower_main"
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}


def arguments(*overrides: str) -> tuple[str, ...]:
    return ("+experiment=cifar10_resnet", "trainer=ddp", *SMALL, "trainer.max_epochs=2", "seed=21", *overrides)


def followers_of(pid: int) -> list[psutil.Process]:
    """The processes that a run started for its other ranks."""
    return [child for child in psutil.Process(pid).children() if FOLLOWER in child.cmdline()]


def runs_of(clone: Path) -> set[Path]:
    return set((clone / "experiments" / "runs").glob("*/*"))


def mlflow_run_count(clone: Path) -> int:
    """The number of runs in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'experiments' / 'mlflow.db'}")
    return len(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


@pytest.fixture(scope="module")
def uneven(clone: Path, run: Run) -> tuple[str, ...]:
    """Overrides by which the last validation batch is smaller than the number of processes."""
    run("python", "-m", "src.train", "+experiment=cifar10_resnet", *SMALL, "trainer.max_epochs=1")  # prepares the data
    (meta,) = (json.loads(path.read_text()) for path in clone.glob("data/direct/*/processed/sample/cifar10/meta.json"))
    count = meta["splits"]["val"]["examples"]
    size = next(size for size in range(50, count) if count % size == 1)
    return tuple(word.format(size=size) for word in UNEVEN)


@pytest.fixture(scope="module")
def ddp_run(clone: Path, run: Run, uneven: tuple[str, ...]) -> Path:
    """The folder of a run that started its second process itself."""
    before = runs_of(clone)
    done = run("python", "-m", "src.train", *arguments(*uneven))
    assert len(re.findall(r"^epoch 2/2", done.stdout, re.MULTILINE)) == 1
    assert runs_of(clone) - before == {clone / output_of(done.stdout)}
    return clone / output_of(done.stdout)


def has_equal_files(one: Path, other: Path) -> bool:
    """Whether two runs wrote the same bytes."""
    names = ("model.safetensors", "model.json", "metrics.json", "history.csv")
    return all((one / "train" / name).read_bytes() == (other / "train" / name).read_bytes() for name in names)


@pytest.mark.slow
def test_metrics_equal_those_of_one_process_over_all_examples(ddp_run: Path, clone: Path) -> None:
    from src.data.batching import batches
    from src.models import weights

    content = yaml.safe_load((ddp_run / "config.yaml").read_text())
    config: Config = check({key: value for key, value in content.items() if key not in ("defaults", "hydra")})
    folder = clone / next(clone.glob("data/direct/*/processed/sample/cifar10"))
    model = weights.load(config.model, packed.read_meta(folder), ddp_run / "train")
    ((images, labels),) = batches(
        folder, "val", config.loader.model_copy(update={"eval_batch_size": 10**6}), train=False
    )
    with torch.no_grad():
        logits = model(images)
    reported = json.loads((ddp_run / "train" / "metrics.json").read_text())
    assert reported["val_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=1e-6)
    assert reported["val_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.slow
def test_torchrun_gives_the_same_bits_and_writes_and_tracks_once(
    ddp_run: Path, clone: Path, run: Run, uneven: tuple[str, ...]
) -> None:
    before, count = runs_of(clone), mlflow_run_count(clone)
    done = run("torchrun", "--standalone", "--nproc-per-node=2", "-m", "src.train", *arguments(*uneven))
    lines = re.findall(r"^(epoch \d|trained)", done.stdout, re.MULTILINE)
    assert lines == ["epoch 1", "epoch 2", "trained"]
    assert runs_of(clone) - before == {clone / output_of(done.stdout)}
    assert mlflow_run_count(clone) - count == 1
    assert has_equal_files(ddp_run, clone / output_of(done.stdout))
    assert not (clone / "lightning_logs").exists()
    assert subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True).stdout == ""


@pytest.mark.slow
@pytest.mark.long
def test_srun_gives_the_same_bits(ddp_run: Path, clone: Path, uneven: tuple[str, ...]) -> None:
    before = runs_of(clone)
    outputs = run_together(
        clone,
        [
            (
                {
                    **SLURM,
                    "SLURM_PROCID": rank,
                    "SLURM_LOCALID": rank,
                    "SLURM_NODEID": "0",
                    "SLURM_NTASKS_PER_NODE": "2",
                },
                (sys.executable, "-m", "src.train", *arguments(*uneven)),
            )
            for rank in ("0", "1")
        ],
    )
    assert outputs[1] == ""
    assert runs_of(clone) - before == {clone / output_of(outputs[0])}
    assert has_equal_files(ddp_run, clone / output_of(outputs[0]))


@pytest.mark.slow
@pytest.mark.long
def test_two_nodes_give_the_same_bits(ddp_run: Path, clone: Path, uneven: tuple[str, ...]) -> None:
    before = runs_of(clone)
    nodes = ("trainer.num_nodes=2", "trainer.devices=1")
    launch = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    outputs = run_together(
        clone,
        [
            ({}, ("torchrun", *launch, f"--node-rank={node}", "-m", "src.train", *arguments(*uneven, *nodes)))
            for node in range(2)
        ],
    )
    assert runs_of(clone) - before == {clone / output_of(outputs[0])}
    assert has_equal_files(ddp_run, clone / output_of(outputs[0]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_together(clone: Path, commands: list[tuple[dict[str, str], tuple[str, ...]]]) -> list[str]:
    """Runs commands at the same time, each with additional environment variables; their stdout."""
    running = [
        subprocess.Popen(
            words,
            cwd=clone,
            env=commands_environment() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables, words in commands
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), outputs
    return [stdout for stdout, _ in outputs]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_ending_the_first_process_ends_both_and_the_run_resumes(
    stop: signal.Signals, code: int, clone: Path, run: Run
) -> None:
    limits = ("trainer.max_epochs=12", "trainer.checkpoint_seconds=0")
    words = ("+experiment=cifar10_resnet", "trainer=ddp", *SMALL, *limits, f"seed={30 + stop}")
    uninterrupted = sha256(clone, output_of(run("python", "-m", "src.train", *words).stdout))
    process = start(clone, *words)
    wait_for(process, r"^epoch 2/12")
    (second,) = followers_of(process.pid)
    process.send_signal(stop)
    process.communicate(timeout=60)
    assert process.returncode == code
    second.wait(60)
    done = run("python", "-m", "src.train", *words)
    assert done.stdout.count("goes on with the run that was interrupted") == 1
    assert "epoch 1/12" not in done.stdout
    assert sha256(clone, output_of(done.stdout)) == uninterrupted


@pytest.mark.slow
@pytest.mark.long
def test_a_run_ends_with_a_message_when_its_second_process_is_killed(clone: Path) -> None:
    process = start(clone, *arguments("trainer.max_epochs=60", "seed=71"))
    wait_for(process, r"^epoch 1/60")
    (second,) = followers_of(process.pid)
    second.kill()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "train failed: process 1 of this run ended (signal 9, out of memory?)" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.long
def test_a_wrong_number_of_processes_is_refused_once(clone: Path, run: Run) -> None:
    words = [word for word in arguments() if word != "trainer=ddp"]
    done = run("torchrun", "--standalone", "--nproc-per-node=2", "-m", "src.train", *words, check=False)
    assert done.returncode == 1
    refusals = re.findall(r"^configuration refused: .*", done.stderr, re.MULTILINE)
    assert len(refusals) == 1
    assert "torchrun started 2 processes" in refusals[0]
    assert "say trainer=ddp trainer.devices=2 trainer.num_nodes=1" in refusals[0]


@pytest.mark.slow
@pytest.mark.long
def test_multirun_trains_its_models_one_after_another_over_two_processes(clone: Path, run: Run) -> None:
    words = ("-m", "+experiment=cifar10_resnet", "trainer=ddp", *SMALL, "trainer.max_epochs=1", "seed=0,2")
    torchrun = ("torchrun", "--standalone", "--nproc-per-node=2", "-m", "src.train", *words)
    digests = []
    for command in (("python", "-m", "src.train", *words), torchrun):
        done = run(*command)
        folders = re.findall(r"trained in [\d.]+ s: (\S+)/train", done.stdout)
        digests.append([sha256(clone, Path(folder)) for folder in folders])
    assert len(set(digests[0])) == 2
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_of_ddp_trials_counts_failures_and_retries_lost_processes(clone: Path) -> None:
    """A grid of three learning rates, one of which diverges; the second process of the first trial is killed."""
    words = (
        "+experiment=cifar10_resnet",
        "trainer=ddp",
        *SMALL,
        "trainer.max_epochs=2",
        "sweep.sampler=grid",
        "sweep.study=ddp",
        "sweep.space={model.optimizer.lr: {choice: [0.1, 0.2, 1e38]}}",
    )
    process = processes.start(clone, "src.sweep", *words)
    next(followers(process)).kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert re.search(r"trial \d: its process died", output), output
    with (clone / "experiments" / "sweeps" / "ddp" / "trials.csv").open(newline="") as file:
        rows = {row["model.optimizer.lr"]: row for row in csv.DictReader(file)}
    assert {rate: row["state"] for rate, row in rows.items()} == {"0.1": "complete", "0.2": "complete", "1e+38": "fail"}
    assert "NaN" in rows["1e+38"]["reason"]


def followers(sweep: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    """Yields the second processes of a sweep's trials as they start."""
    while sweep.poll() is None:
        for child in psutil.Process(sweep.pid).children(recursive=True):
            try:
                if FOLLOWER in child.cmdline():
                    yield child
            except psutil.Error:
                continue
    raise AssertionError(f"no trial started a second process:\n{sweep.communicate()[0]}")


# --- within one process -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    """An MLP for ten digits of noise, on two processes."""
    return noise_digits(tmp_path, "trainer=ddp", "trainer.max_epochs=5")


@pytest.mark.slow
def test_pruning_stops_all_processes_and_leaves_no_trace(tiny: Config, tmp_path: Path) -> None:
    from src.sweeping.trial import Reporter
    from src.training import determinism, run

    environment = dict(os.environ)
    meta = packed.read_meta(tiny.processed)
    digests = []
    for _ in range(2):  # the same process trains twice
        determinism.fix(tiny.seed, tiny.trainer.threads_each)
        work = run.work_folder(tiny, meta, tmp_path / "work")
        pruner = Reporter("val_accuracy", lambda epoch, _: epoch == 2)
        trained = run.fit(tiny, meta, work, lambda metrics, step: None, [pruner])
        assert [row["epoch"] for row in trained.history.rows] == [1, 2]
        digests.append(trained.optimizer_sha256)
        work.remove_checkpoints()
        assert not torch.distributed.is_initialized()
        assert os.environ == environment
        assert not followers_of(os.getpid())
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_training_metrics_are_those_of_all_processes(tiny: Config, tmp_path: Path) -> None:
    """At a learning rate without effect they equal those of a single process."""
    from src.training import determinism, run

    meta = packed.read_meta(tiny.processed)
    still = {"optimizer": tiny.model.optimizer.model_copy(update={"lr": 1e-30})}  # type: ignore[attr-defined]
    rows = []
    for devices, strategy in ((2, "ddp"), (1, "auto")):
        trainer = tiny.trainer.model_copy(
            update={"devices": devices, "strategy": strategy, "max_epochs": 1, "precision": "32"}
        )
        config = tiny.model_copy(update={"trainer": trainer, "model": tiny.model.model_copy(update=still)})
        determinism.fix(config.seed, 1)
        work = run.work_folder(config, meta, tmp_path / "work")
        (row,) = run.fit(config, meta, work, lambda metrics, step: None).history.rows
        rows.append(row)
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.parametrize(
    ("environment", "override", "message"),
    [
        ({}, "trainer.num_nodes=2", "this process was started alone: start all by torchrun or srun"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            "trainer=ddp",
            "trainer.devices: 2 a node, with trainer.num_nodes=1, but torchrun started 4 processes, 2 a node: "
            "say trainer=ddp trainer.devices=2 trainer.num_nodes=2",
        ),
        (
            {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "trainer=cpu",
            "trainer.devices: 1 a node, .* but srun started 2 processes, 2 a node: say trainer=ddp trainer.devices=2",
        ),
    ],
)
def test_a_launcher_that_contradicts_the_configuration_is_refused(
    environment: dict[str, str], override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launcher.check_processes(compose(["experiment=cifar10_resnet", "output=out", override]).trainer)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        # The batch script of a job of four tasks, which is not one of them.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODELIST": "a"},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_a_process_without_a_launcher_is_alone(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.read_launch() is None


def test_slurm_steps_meet_on_their_first_node_at_different_ports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (SLURM | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[07-08,11],gpu3")
    launches = [launcher.read_launch()]
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    launches.append(launcher.read_launch())
    ports = [launch.rendezvous.removeprefix("tcp://gpu07:") for launch in launches if launch]
    assert len(set(ports)) == 2
    assert all(int(port) in launcher.PORTS for port in ports)
    assert {(launch.rank, launch.local_rank, launch.per_node) for launch in launches if launch} == {(5, 1, 4)}


def test_an_indivisible_batch_size_is_refused_with_the_next_divisible() -> None:
    with pytest.raises(ConfigError, match=r"^data\.loader\.batch_size: 25 .* 2 processes .* the next that can is 26$"):
        compose(["experiment=cifar10_resnet", "output=out", "trainer=ddp", "data.loader.batch_size=25"])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 9, 10, 11, 19, 21])
def test_processes_evaluate_every_example_once_in_equally_many_batches(count: int, world: int) -> None:
    from src.data.kinds.images import ImageBatches, ImageLoader

    split = {"images": torch.zeros(count, 1, 2, 2, dtype=torch.uint8), "labels": torch.arange(count)}
    shares = [
        ImageBatches(
            split,
            {"kind": "images"},
            ImageLoader(batch_size=6, eval_batch_size=10),
            train=False,
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]
    label_batches = [[labels.tolist() for _, labels in share] for share in shares]
    assert sorted(label for share in label_batches for batch in share for label in batch) == list(range(count))
    assert all(len(batches) == len(share) for batches, share in zip(label_batches, shares, strict=True))
    assert len({len(batches) for batches in label_batches}) == 1
    assert all(batch for share in label_batches for batch in share)


def test_fewer_examples_than_processes_are_refused() -> None:
    from src.data.kinds.images import ImageBatches, ImageLoader

    split = {"images": torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "labels": torch.arange(1)}
    with pytest.raises(packed.PackedError, match="1 examples can't be shared out among 2 processes"):
        ImageBatches(split, {"kind": "images"}, ImageLoader(batch_size=6), train=False, world=2)
