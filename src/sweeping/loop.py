"""The sweep's own process: hands trials to workers, tells the study what came of them, prints a line for each."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from src.common.errors import Failure
from src.common.paths import ROOT
from src.data.preparing import prepared
from src.sweeping import report
from src.sweeping.launchers import Launcher, launcher
from src.sweeping.space import SweepConfig
from src.sweeping.storage import failures
from src.sweeping.study import FOLDER, Study
from src.sweeping.worker import Ended, Failed, Interrupted, Job, Message, Validated, Worker
from src.tracking.courier import Courier
from src.tracking.tracker import DEFAULT_STORE, RunInfo, Tracker, resolve_store

WORK = ROOT / "experiments" / ".work" / "sweeps"
POLL_S = 0.5  # how soon a signal is heeded
ASK_AGAIN_S = 5.0  # while other processes train the last trials: one of them may die


def run(config: SweepConfig, given: Sequence[str]) -> None:
    """Runs a study, or goes on with it, until its budget is spent; `given`: the overrides that all trials share.

    Raises:
        Failure: the study is another one, is under way already, or its data can't be prepared.
        SystemExit: a signal asked for the end; 143 or 130.
    """
    folder, work = FOLDER / config.study, WORK / config.study
    folder.mkdir(parents=True, exist_ok=True)
    with failures(), _place(folder, shared=config.sweep.storage is not None) as place, _stoppable() as stop:
        study = Study(config, given, folder)
        prepared(config)
        info = RunInfo(
            experiment=config.name,
            name=f"sweep {config.study}",
            params=report.parameters(config),
            tags={"pipeline.profile": config.profile.name, "sweep.study": config.study},
            identity=study.journal,
        )
        tracker = Tracker.resume(work / f"tracking{place}.jsonl", info, sender=False)
        courier = Courier(work, resolve_store(None, DEFAULT_STORE), study.storage.lock)
        try:
            with (
                tracker,
                contextlib.closing(launcher(config, work / f"workers{place}")) as workers,
                contextlib.closing(_Loop(study, workers, tracker, stop)) as loop,
            ):
                loop.run()
                study.leave()
                with FileLock(folder / "report.lock"):  # others that share the study end at the same time
                    report.write(study, tracker)
                if stop:
                    said = f"{len(study.trials)} trials have ended; the same command goes on"
                    print(f"{stop[0].name}: {said}", flush=True)
                    raise SystemExit(128 + stop[0])
        finally:
            courier.close()


class _Loop:
    def __init__(self, study: Study, launcher: Launcher, tracker: Tracker, stop: list[signal.Signals]) -> None:
        self.study = study
        self.launcher = launcher
        self.tracker = tracker
        self.stop = stop
        self.table = report.Table(study)
        self.workers: list[Worker] = []
        self.rests_until = 0.0

    def run(self) -> None:
        report.warm()
        told = False
        try:
            while True:
                self._hand_out()
                busy = [worker for worker in self.workers if worker.job]
                if not busy and (self.stop or self._is_over()):
                    return
                if self.stop and not told:
                    told = True
                    for worker in busy:
                        worker.end()
                watched = [each for worker in self.workers for each in worker.watched]
                ready = wait([*self.launcher.watched, *watched], POLL_S)
                for worker in list(self.workers):
                    if worker.connection in ready:
                        self._listen(worker)
                    elif not set(ready).isdisjoint(worker.watched):
                        self._bury(worker)
        finally:
            for worker in self.workers:
                worker.connection.close()

    def close(self) -> None:
        """Sees the workers off, which have been ending since they were hung up on."""
        for worker in self.workers:
            worker.leave()

    def _is_over(self) -> bool:
        """Nothing is left to be trained; nor do others train anything, of which some might be left."""
        return not self.study.startable and not self.study.elsewhere

    def _hand_out(self) -> None:
        """Gives each idle worker a trial, and asks for more workers, as long as there are trials to be started."""
        config = self.study.config
        if arrived := self.launcher.arrived():
            self.workers += arrived
            self.rests_until = 0.0
        while not self.stop and time.monotonic() >= self.rests_until:
            idle = next((worker for worker in self.workers if not worker.job), None)
            if idle is None:
                pending = self.launcher.pending
                if len(self.workers) + pending >= config.sweep.workers:
                    return
                if self.study.startable > pending:
                    self.launcher.request()
                    self.workers += self.launcher.arrived()
                    continue
            planned = self.study.next() if idle else None
            if idle is None or planned is None:
                self.rests_until = time.monotonic() + ASK_AGAIN_S
                return
            if planned.inherited:
                print(f"trial {planned.number}: taken over from a process that died", flush=True)
            if planned.config["trainer"]["threads"] is None:
                planned.config["trainer"]["threads"] = self.launcher.threads
            idle.train(
                Job(
                    number=planned.number,
                    study=config.study,
                    config=planned.config,
                    objectives=tuple(config.objectives),
                    prunes=config.sweep.pruner != "none",
                    parent=self.study.journal,
                    work=WORK / config.study / str(planned.number),
                )
            )

    def _listen(self, worker: Worker) -> None:
        try:
            message: Message = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        assert worker.job is not None
        number = worker.job.number
        match message:
            case Validated(epoch, value):
                prune = self.study.report(number, epoch, value)
                if worker.job.prunes:
                    worker.answer(prune)
            case Ended(values, pruned, seconds):
                self.study.end(number, values, pruned=pruned, seconds=seconds)
                self._close(worker)
            case Failed(reason):
                self.study.fail(number, reason)
                self._close(worker)
            case Interrupted():  # all are to end; or a cluster wants its machine back
                self.workers.remove(worker)
                if not self.stop:
                    print(f"trial {number}: interrupted, goes on elsewhere", flush=True)
                    self.study.put_back(number)
                    self.rests_until = 0.0

    def _bury(self, worker: Worker) -> None:
        """A worker died: its trial is another one's, unless all are to end."""
        self.workers.remove(worker)
        if worker.job is None or self.stop:
            return
        number, how = worker.job.number, worker.death
        print(f"trial {number}: its process died ({how})", flush=True)
        self.rests_until = 0.0
        if self.study.lost(number, how):
            self._close(worker)

    def _close(self, worker: Worker) -> None:
        assert worker.job is not None
        number, worker.job = worker.job.number, None
        self._hand_out()  # the worker does not wait for what is only told
        trial = self.study.optuna.get_trials(deepcopy=False)[number]
        if not trial.state.is_finished():
            print(f"trial {trial.number}: is another process's by now, this one was silent too long", flush=True)
            return
        best = self.study.best
        self.table.print(trial, best)
        self.tracker.log_metrics(report.progress(self.study, trial, best), trial.number)


@contextlib.contextmanager
def _place(folder: Path, *, shared: bool) -> Iterator[str]:
    """Holds the study's folder; of a shared study a place of its own, whose name is on what this process alone writes.

    Raises:
        Failure: another process holds the folder.
    """
    names = (f"-{socket.gethostname()}-{number}" for number in itertools.count()) if shared else iter([""])
    for name in names:
        lock = FileLock(folder / f"lock{name}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield name
        finally:
            lock.release()
        return
    raise Failure(f"this study is under way already ({folder / 'lock'} is held): wait for it, or stop it")


@contextlib.contextmanager
def _stoppable() -> Iterator[list[signal.Signals]]:
    """Notes the first SIGTERM or Ctrl-C in the list; a second one ends the process, and so the workers, at once."""
    stop: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        if stop:
            os._exit(128 + number)
        stop.append(signal.Signals(number))
        os.write(2, f"\n{stop[0].name}: saving, then ending (a second one ends at once)\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
