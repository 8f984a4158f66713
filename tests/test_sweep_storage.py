"""Studies that several processes share: one count, one run in MLflow, and nobody's death leaves a hole."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.common.errors import Failure
from src.sweeping import storage
from src.sweeping.space import Sweep
from tests.conftest import Run
from tests.processes import wait_for
from tests.servers import PASSWORD, PostgreSQL
from tests.test_sweep import CIFAR, start, trials_of, workers_of

SWEEP = ("python", "-m", "src.sweep")
SPACE = {"model.optimizer.lr": {"float": [0.03, 0.4]}}
SHORT = (*(word for word in CIFAR if not word.startswith("trainer.max_epochs")), "trainer.max_epochs=1")


def sweep(address: str, **more: object) -> Sweep:
    return Sweep.model_validate({"space": SPACE, "storage": address, **more})


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def parents(clone: Path, study: str) -> list[str]:
    """The states of the runs in MLflow that are the study's own."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'experiments' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cifar10_resnet")
    assert experiment
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = 'sweep {study}'")
    return [run.info.status for run in found]


@pytest.mark.slow
def test_two_processes_share_a_study_in_postgresql_to_the_exact_count(clone: Path, postgresql: str) -> None:
    words = (*SHORT, f"sweep.storage={postgresql}", "sweep.study=shared", "sweep.trials=9")
    both = [start(clone, *words), start(clone, *words)]
    said = [finished(process) for process in both]
    rows = trials_of(clone, "shared")
    assert [row["trial"] for row in rows] == list(map(str, range(9)))
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    ended = [re.findall(r"^ +(\d+)  (?:complete|pruned)", each, re.MULTILINE) for each in said]
    assert sorted(int(number) for each in ended for number in each) == list(range(9))  # each trial was one process's
    assert all(ended)  # and each had some
    assert parents(clone, "shared") == ["FINISHED"]
    assert not any(PASSWORD in each for each in said)
    assert not files_with(PASSWORD, clone / "experiments")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["postgresql", "journal"])
def test_a_trial_whose_process_was_killed_is_taken_over_by_another(
    clone: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue("postgresql") if kind == "postgresql" else f"journal:{tmp_path / 'study.log'}"
    words = (*CIFAR, f"sweep.storage={address}", f"sweep.study=over-{kind}", "sweep.trials=10", "sweep.heartbeat_s=1")
    victim, heir = start(clone, *words), start(clone, *words)
    wait_for(heir, r"^ +\d+  complete")
    wait_for(victim, r"^ +\d+  complete")
    (worker,) = workers_of(victim.pid)
    time.sleep(0.3)  # into the next trial
    victim.kill()
    worker.kill()
    said = finished(heir)
    victim.wait(10)
    assert re.search(r"trial \d+: taken over from a process that died", said)
    rows = trials_of(clone, f"over-{kind}")
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
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 143, said
    begun = time.monotonic()
    finished(start(clone, *words, "sweep.trials=4"))  # a heartbeat is 60 s
    assert time.monotonic() - begun < 60
    assert [row["state"] for row in trials_of(clone, "left")] == ["complete"] * 4


def _ask(address: str, folder: Path, count: int, numbers: multiprocessing.Queue[int]) -> None:
    """A process that asks until there is no more; trains nothing."""
    from src.configuration.composing import check, compose_unchecked
    from src.sweeping.space import SweepConfig
    from src.sweeping.study import Study

    given = [*SHORT, "sweep.study=counted", f"sweep.trials={count}", f'sweep.storage="{address}"', "output=."]
    config: SweepConfig = check(compose_unchecked(given), SweepConfig)
    study = Study(config, [word for word in SHORT if not word.startswith("sweep.")], folder)
    while planned := study.next():
        numbers.put(planned.number)
        study.end(planned.number, [0.5], pruned=False, seconds=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgresql", "journal"])
def test_processes_that_create_and_ask_at_once_are_given_each_trial_once(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue("postgresql") if kind == "postgresql" else f"journal:{tmp_path / 'study.log'}"
    from src.common.paths import ROOT

    context = multiprocessing.get_context("spawn")
    numbers: multiprocessing.Queue[int] = context.Queue()
    folder = ROOT / "experiments" / "sweeps" / "counted"  # where nothing is written: the storage is elsewhere
    given = (address, folder, 20, numbers)
    processes = [context.Process(target=_ask, args=given, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(numbers.get(timeout=10) for _ in range(20)) == list(range(20))
    assert numbers.empty()


def test_a_journal_whose_last_line_is_torn_is_read_and_gone_on_with(tmp_path: Path) -> None:
    import optuna

    path = tmp_path / "study.log"

    def opened() -> optuna.Study:
        kept = storage.opened(sweep(f"journal:{path}"), "torn", tmp_path)
        return optuna.create_study(storage=kept.backend, study_name="torn", load_if_exists=True)

    opened().ask()
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"worker')  # a machine that lost its power
    opened().ask()
    assert [trial.number for trial in opened().trials] == [0, 1]


@pytest.fixture(params=["postgresql", "journal"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> storage.Storage:
    if request.param == "journal":
        return storage.opened(sweep(f"journal:{tmp_path / 'study.log'}", heartbeat_s=1), "beats", tmp_path)
    return storage.opened(sweep(request.getfixturevalue("postgresql"), heartbeat_s=1), "beats", tmp_path)


def test_a_trial_is_silent_when_its_heartbeat_is_old(
    kept: storage.Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import optuna

    study = optuna.create_study(storage=kept.backend, study_name="beats")
    trials = [study.ask() for _ in range(2)]
    for trial in trials:
        kept.beat(trial._trial_id)
    assert kept.silent(study) == set()
    until = time.monotonic() + 20
    while not kept.silent(study) and time.monotonic() < until:
        kept.beat(trials[0]._trial_id)
        time.sleep(0.2)
    assert kept.silent(study) == {trials[1]._trial_id}


def test_a_lock_is_one_process_s_and_ends_with_it(kept: storage.Storage) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(kept.lock, ready), daemon=True)
    with kept.lock("ask"), kept.lock("mlflow"):
        other.start()
        assert not ready.wait(3)
    assert ready.wait(20)
    other.kill()
    other.join()
    if isinstance(kept, storage._Database):  # a file stays, and is forced after half a minute
        with kept.lock("ask"):
            pass


def _hold(lock: storage.Lock, ready: Callable[[], None]) -> None:
    with lock("ask"):
        ready.set()  # type: ignore[attr-defined]
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
    for address, code, said in (
        (postgresql.replace(PASSWORD, "wr0ng"), 1, "password authentication failed"),
        (re.sub(r":\d+/", ":1/", postgresql), 1, "Connection refused"),
        (postgresql.replace("postgresql:", "mysql:"), 2, "is none of null, postgresql://USER@HOST/DATABASE, journal:"),
    ):
        done = run(*SWEEP, *SHORT, f"sweep.storage={address}", "sweep.study=refused", check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert PASSWORD not in done.stdout + done.stderr
        assert "wr0ng" not in done.stdout + done.stderr


def test_a_folder_where_no_journal_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match=r"sweep\.storage: .*file/study\.log can't be used as a journal"):
        storage.opened(sweep(f"journal:{tmp_path}/file/study.log"), "nowhere", tmp_path)
