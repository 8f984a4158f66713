"""The sweep's own process: hands trials to workers, tells the study what came of them, prints a line for each."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from types import FrameType

from filelock import FileLock, Timeout

from src.config import ROOT, cores
from src.errors import Failure
from src.sweeping import report
from src.sweeping.courier import Courier
from src.sweeping.space import SweepConfig
from src.sweeping.study import FOLDER, Study
from src.sweeping.worker import Ended, Failed, Interrupted, Job, Message, Validated, Worker
from src.training.preparation import prepared
from src.training.tracking import DEFAULT_STORE, Tracker, resolve_store

WORK = ROOT / "experiments" / ".work" / "sweeps"
POLL_S = 0.5  # how soon a signal is heeded


def run(config: SweepConfig, given: Sequence[str]) -> None:
    """Runs a study, or goes on with it, until its budget is spent; `given`: the overrides that all trials share.

    Raises:
        Failure: the study is another one, is under way already, or its data can't be prepared.
        SystemExit: a signal asked for the end; 143 or 130.
    """
    folder = FOLDER / config.study
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "lock"), _stoppable() as stop:
        study = Study(config, given, folder)
        prepared(config)
        work = WORK / config.study
        tracker = Tracker.resume(
            journal=work / "tracking.jsonl",
            identity=study.journal,
            experiment=config.name,
            name=f"sweep {config.study}",
            params=report.parameters(config),
            tags={"pipeline.profile": config.profile.name, "sweep.study": config.study},
            sender=False,
        )
        courier = Courier(work, resolve_store(None, DEFAULT_STORE))
        try:
            with tracker:
                _Loop(study, tracker, stop).run()
                report.write(study, tracker)
                if stop:
                    said = f"{len(study.trials)} trials have ended; the same command goes on"
                    print(f"{stop[0].name}: {said}", flush=True)
                    raise SystemExit(128 + stop[0])
        finally:
            courier.close()


class _Loop:
    def __init__(self, study: Study, tracker: Tracker, stop: list[signal.Signals]) -> None:
        self.study = study
        self.tracker = tracker
        self.stop = stop
        self.table = report.Table(study)
        self.workers: list[Worker] = []

    def run(self) -> None:
        report.warm()
        told = False
        try:
            while True:
                self._hand_out()
                busy = [worker for worker in self.workers if worker.job]
                if not busy:
                    return
                if self.stop and not told:
                    told = True
                    for worker in busy:
                        worker.end()
                ready = wait([each for w in busy for each in (w.connection, w.process.sentinel)], POLL_S)
                for worker in busy:
                    if worker.connection in ready:
                        self._listen(worker)
                    elif worker.process.sentinel in ready:
                        self._bury(worker)
        finally:
            for worker in self.workers:
                worker.connection.close()
            for worker in self.workers:
                worker.process.join(POLL_S)
                worker.end()

    def _hand_out(self) -> None:
        """Gives each idle worker a trial, as long as there are some."""
        config = self.study.config
        while not self.stop:
            idle = next((worker for worker in self.workers if not worker.job), None)
            if idle is None and len(self.workers) >= config.sweep.workers:
                return
            planned = self.study.next()
            if planned is None:
                return
            if idle is None:
                idle = Worker(config.trainer.accelerator)
                self.workers.append(idle)
            if config.sweep.workers > 1 and planned.config["trainer"]["threads"] is None:
                processes = config.sweep.workers * config.trainer.devices
                planned.config["trainer"]["threads"] = max(1, cores() // processes)
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
            case Interrupted():
                worker.job = None
                self.workers.remove(worker)

    def _bury(self, worker: Worker) -> None:
        """A worker died: its trial is another one's, unless all are to end."""
        assert worker.job is not None
        self.workers.remove(worker)
        number = worker.job.number
        if self.stop:
            return
        how = worker.death
        print(f"trial {number}: its process died ({how})", flush=True)
        if self.study.lost(number, how):
            self._close(worker)

    def _close(self, worker: Worker) -> None:
        assert worker.job is not None
        trial = self.study.optuna.get_trials(deepcopy=False)[worker.job.number]
        self.table.print(trial)
        self.tracker.log_metrics(report.progress(self.study, trial), trial.number)
        worker.job = None


@contextlib.contextmanager
def _alone(path: os.PathLike[str]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Failure(f"this study is under way already ({path} is held): wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


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
