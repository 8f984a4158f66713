"""Studies that several processes share: an exact count, one run in MLflow, trials of dead processes taken over."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import optuna
import pytest

from src.common.errors import Failure
from src.common.paths import ROOT
from src.configuration.composing import check, compose_unchecked
from src.sweeping import storage
from src.sweeping.optuna_internals import trial_id
from src.sweeping.space import Sweep, SweepConfig
from src.sweeping.study import Study
from tests.conftest import Run
from tests.processes import wait_for
from tests.servers import PASSWORD, PostgreSQL
from tests.test_sweep import CIFAR, SWEEP, start, trials_of, workers_of

SPACE = {"model.optimizer.lr": {"float": [0.03, 0.4]}}
SHORT = (*(word for word in CIFAR if not word.startswith("trainer.max_epochs")), "trainer.max_epochs=1")


def storage_at(address: str, folder: Path, study: str = "study") -> storage.Storage:
    return storage.open_storage(Sweep.model_validate({"space": SPACE, "storage": address}), study, folder)


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def parents(clone: Path, study: str) -> list[str]:
    """The states of the runs in MLflow that are the study's own."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'experiments' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cifar10_resnet")
    assert experiment
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = 'sweep {study}'")
    return [run.info.status for run in runs]


@pytest.fixture(params=["postgresql", "journal"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return f"journal:{tmp_path / 'study.log'}"
    return str(request.getfixturevalue("postgresql"))


@pytest.mark.slow
def test_two_processes_share_a_study_in_postgresql_to_the_exact_count(clone: Path, postgresql: str) -> None:
    words = (*SHORT, f"sweep.storage={postgresql}", "sweep.study=shared", "sweep.trials=9")
    both = [start(clone, *words), start(clone, *words)]
    outputs = [finished(process) for process in both]
    rows = trials_of(clone, "shared")
    assert [row["trial"] for row in rows] == list(map(str, range(9)))
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    ended = [re.findall(r"^ +(\d+)  (?:complete|pruned)", output, re.MULTILINE) for output in outputs]
    assert sorted(int(number) for numbers in ended for number in numbers) == list(range(9))  # one process trained each
    assert all(ended)  # and each process trained some
    assert parents(clone, "shared") == ["FINISHED"]
    assert not any(PASSWORD in output for output in outputs)
    assert not files_with(PASSWORD, clone / "experiments")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("fast_heartbeats")
def test_a_trial_whose_process_was_killed_is_taken_over_by_another(clone: Path, address: str) -> None:
    study = f"over-{address.partition(':')[0]}"
    words = (*CIFAR, f"sweep.storage={address}", f"sweep.study={study}", "sweep.trials=10")
    victim, heir = start(clone, *words), start(clone, *words)
    wait_for(heir, r"^ +\d+  complete")
    wait_for(victim, r"^ +\d+  complete")
    (worker,) = workers_of(victim.pid)
    time.sleep(0.3)  # into the next trial
    victim.kill()
    worker.kill()
    output = finished(heir)
    victim.wait(10)
    assert re.search(r"trial \d+: taken over from a process that died", output)
    rows = trials_of(clone, study)
    assert [row["trial"] for row in rows] == list(map(str, range(10)))
    assert {row["state"] for row in rows} <= {"complete", "pruned"}


@pytest.mark.slow
@pytest.mark.long
def test_a_process_that_is_stopped_gives_its_trial_to_the_next_without_a_wait(clone: Path, tmp_path: Path) -> None:
    words = (*CIFAR, f"sweep.storage=journal:{tmp_path / 'study.log'}", "sweep.study=left")
    first = start(clone, *words, "sweep.trials=4")
    wait_for(first, r"^ +1  complete")
    time.sleep(0.3)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 143, output
    finished(start(clone, *words, "sweep.trials=4"))  # would need 300 s if it waited for missed heartbeats
    assert [row["state"] for row in trials_of(clone, "left")] == ["complete"] * 4


def _ask(address: str, folder: Path, count: int, numbers: multiprocessing.Queue[int]) -> None:
    """A process that asks until there is no trial left, and trains none."""
    shared = [word for word in SHORT if not word.startswith("sweep.")]
    words = [*SHORT, "sweep.study=counted", f"sweep.trials={count}", f'sweep.storage="{address}"', "output=."]
    config: SweepConfig = check(compose_unchecked(words), SweepConfig)
    study = Study(config, shared, folder)
    while trial := study.next_trial():
        numbers.put(trial.number)
        study.end(trial.number, [0.5], pruned=False, seconds=0.1)


@pytest.mark.slow
def test_processes_that_create_and_ask_at_once_get_each_trial_once(address: str) -> None:
    context = multiprocessing.get_context("spawn")
    numbers: multiprocessing.Queue[int] = context.Queue()
    folder = ROOT / "experiments" / "sweeps" / "counted"  # nothing is written into it: the storage is elsewhere
    processes = [context.Process(target=_ask, args=(address, folder, 20, numbers), daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(numbers.get(timeout=10) for _ in range(20)) == list(range(20))
    assert numbers.empty()


def test_a_journal_whose_last_line_is_incomplete_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "study.log"

    def open_study() -> optuna.Study:
        backend = storage_at(f"journal:{path}", tmp_path).backend
        return optuna.create_study(storage=backend, study_name="torn", load_if_exists=True)

    open_study().ask()
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"worker')  # the machine lost its power
    open_study().ask()
    assert [trial.number for trial in open_study().trials] == [0, 1]


def test_a_trial_without_heartbeats_is_stale(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT_S", 1)
    shared = storage_at(address, tmp_path)
    study = optuna.create_study(storage=shared.backend, study_name="heartbeats")
    alive, dead = (trial_id(study.ask()) for _ in range(2))
    shared.record_heartbeat(alive)
    shared.record_heartbeat(dead)
    assert shared.stale_trials(study) == set()
    deadline = time.monotonic() + 20
    while not shared.stale_trials(study) and time.monotonic() < deadline:
        shared.record_heartbeat(alive)
        time.sleep(0.2)
    assert shared.stale_trials(study) == {dead}


def test_a_lock_excludes_other_processes_and_ends_with_its_own(address: str, tmp_path: Path) -> None:
    shared = storage_at(address, tmp_path)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(shared.lock, ready), daemon=True)
    with shared.lock("ask"), shared.lock("mlflow"):
        other.start()
        assert not ready.wait(3)
    assert ready.wait(20)
    other.kill()
    other.join()
    if address.startswith("postgresql:"):  # of a journal the lock's file stays, and is removed after half a minute
        with shared.lock("ask"):
            pass


def _hold(lock: storage.Lock, ready: Event) -> None:
    with lock("ask"):
        ready.set()
        time.sleep(60)


@pytest.mark.slow
@pytest.mark.long
def test_a_database_that_is_away_for_a_while_is_waited_for(
    clone: Path, postgresql: str, postgresql_server: PostgreSQL
) -> None:
    words = (*SHORT, f"sweep.storage={postgresql}", "sweep.study=away", "sweep.trials=6")
    process = start(clone, *words)
    wait_for(process, r"^ +1  complete")
    postgresql_server.stop()
    try:
        line = wait_for(process, "cannot be reached")
    finally:
        postgresql_server.start()
    assert PASSWORD not in line
    assert re.search(r"^the database of the study \(127.0.0.1:\d+/\w+\) cannot be reached, trying for 300 s", line)
    finished(process)
    assert len(trials_of(clone, "away")) == 6


@pytest.mark.slow
@pytest.mark.long
def test_a_storage_that_cannot_be_is_refused_in_one_line_without_its_password(
    clone: Path, postgresql: str, run: Run
) -> None:
    for address, code, message in (
        (postgresql.replace(PASSWORD, "wr0ng"), 1, "password authentication failed"),
        (re.sub(r":\d+/", ":1/", postgresql), 1, "Connection refused"),
        (postgresql.replace("postgresql:", "mysql:"), 2, "is none of null, postgresql://USER@HOST/DATABASE, journal:"),
    ):
        done = run(*SWEEP, *SHORT, f"sweep.storage={address}", "sweep.study=refused", check=False)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert PASSWORD not in done.stdout + done.stderr
        assert "wr0ng" not in done.stdout + done.stderr


def test_a_folder_where_no_journal_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match=r"sweep\.storage: .*file/study\.log can't be used as a journal"):
        storage_at(f"journal:{tmp_path}/file/study.log", tmp_path)
