"""The sweep's own process: assigns trials to local workers, stores their results, prints a line for each trial."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from filelock import FileLock, Timeout

from src.common.errors import Failure
from src.common.paths import WORK
from src.common.signals import Interruption
from src.data.preparing import prepared
from src.sweeping import report
from src.sweeping.messages import Ended, Failed, Job, Message, Validated
from src.sweeping.space import SweepConfig
from src.sweeping.storage import storage_errors_in_one_line
from src.sweeping.study import FOLDER, Study
from src.sweeping.worker import Worker
from src.tracking.folder_sender import FolderSender
from src.tracking.tracker import DEFAULT_STORE, RunInfo, Tracker, resolve_store
from src.training.start import with_weights

SWEEPS = WORK / "sweeps"
POLL_S = 0.5  # after a signal at most this passes until it has an effect
ASK_INTERVAL_S = 5.0  # while other processes train the last trials: one of them may die


def run(config: SweepConfig, overrides: Sequence[str]) -> None:
    """Runs or resumes a study until its budget is spent; `overrides`: Hydra's, of all trials.

    Raises:
        Failure: the study is another one or in use, its data can't be prepared, a metric is not logged, all trials
            failed.
        SystemExit: a signal stopped it; 143 or 130.
    """
    folder, work = FOLDER / config.study, SWEEPS / config.study
    folder.mkdir(parents=True, exist_ok=True)
    is_shared = config.sweep.storage is not None
    with (
        storage_errors_in_one_line(),
        _process_name(folder, is_shared) as name,
        Interruption().handling() as interruption,
    ):
        study = Study(config, overrides, folder)
        with_weights(prepared(config))
        info = RunInfo(
            experiment=config.name,
            name=f"sweep {config.study}",
            params=report.parameters(config),
            tags={"pipeline.profile": config.profile.name, "sweep.study": config.study},
            identity=study.journal,
            is_tracked=config.tracking,
        )
        tracker = Tracker.resume(work / "processes" / name / "tracking.jsonl", info, sender=False)
        sender = FolderSender(resolve_store(None, DEFAULT_STORE), study.storage.lock)
        sender.add(tracker.journal.parent if is_shared else work)  # of a shared study each process sends its own trials
        try:
            with tracker, contextlib.closing(_Loop(study, tracker, sender, interruption)) as loop:
                loop.run()
                study.release()
                with FileLock(folder / "report.lock"):  # the processes of a shared study end at about the same time
                    report.write(study, tracker)
                if interruption.signal:
                    ended = f"{len(study.trials)} trials have ended; the same command goes on"
                    print(f"{interruption.signal.name}: {ended}", flush=True)
                    raise SystemExit(interruption.exit_code)
                report.refuse_total_failure(study)
        finally:
            sender.close()


class _Loop:
    def __init__(self, study: Study, tracker: Tracker, sender: FolderSender, interruption: Interruption) -> None:
        self.study = study
        self.tracker = tracker
        self.sender = sender
        self.interruption = interruption
        self.table = report.Table(study)
        self.workers: list[Worker] = []
        self.next_ask = 0.0

    def run(self) -> None:
        """Returns when no trial is left, or, after a signal, when the workers have saved and exited."""
        report.import_plotting()
        has_terminated = False
        try:
            while True:
                self._assign_trials()
                busy = [worker for worker in self.workers if worker.job]
                if not busy and (self.interruption or self._is_complete()):
                    return
                if self.interruption and not has_terminated:
                    has_terminated = True
                    for worker in busy:
                        worker.terminate()
                ready = wait([item for worker in self.workers for item in worker.waitables], POLL_S)
                for worker in list(self.workers):
                    if worker.connection in ready:
                        self._receive(worker)
                    elif worker.process.sentinel in ready:
                        self._requeue_trial_of(worker)
        finally:
            for worker in self.workers:
                worker.connection.close()

    def close(self) -> None:
        """Waits for the workers to exit; closing their connections told them to."""
        for worker in self.workers:
            worker.shutdown()

    def _is_complete(self) -> bool:
        """Whether neither this process nor another has a trial to train."""
        return not self.study.has_trials_to_start and not self.study.is_in_use_elsewhere

    def _assign_trials(self) -> None:
        """Gives each idle worker a trial, and starts workers, up to `sweep.workers`, while there are more trials."""
        config = self.study.config
        while not self.interruption and time.monotonic() >= self.next_ask:
            worker = next((worker for worker in self.workers if not worker.job), None)
            if worker is None and len(self.workers) == config.sweep.workers:
                return
            if worker is None and self.study.has_trials_to_start:
                free = set(range(config.sweep.workers)) - {worker.number for worker in self.workers}
                self.workers.append(Worker(config.trainer, min(free)))
                continue
            trial = self.study.next_trial() if worker else None
            if worker is None or trial is None:
                self.next_ask = time.monotonic() + ASK_INTERVAL_S
                return
            if trial.is_taken_over:
                print(f"trial {trial.number}: taken over from a process that died", flush=True)
            job = Job(
                number=trial.number,
                study=config.study,
                config=trial.config,
                objectives=tuple(config.objectives),
                prunes=config.sweep.pruner != "none",
                parent=self.study.journal,
                work=SWEEPS / config.study / str(trial.number),
            )
            self.sender.add(job.work)
            worker.assign(job)

    def _receive(self, worker: Worker) -> None:
        try:
            message: Message = worker.connection.recv()
        except (EOFError, OSError):
            self._requeue_trial_of(worker)
            return
        assert worker.job is not None
        number = worker.job.number
        match message:
            case Validated(epoch, value):
                is_pruned = self.study.report(number, epoch, value)
                if worker.job.prunes:
                    worker.send(is_pruned)
            case Ended(values, pruned, seconds):
                self.study.end(number, values, pruned=pruned, seconds=seconds)
                self._finish_trial_of(worker)
            case Failed(reason, ends_sweep):
                self.study.fail(number, reason)
                if ends_sweep:
                    raise Failure(reason)
                self._finish_trial_of(worker)

    def _requeue_trial_of(self, worker: Worker) -> None:
        """Requeues a dead worker's trial, unless the sweep is stopping."""
        self.workers.remove(worker)
        if worker.job is None or self.interruption:
            return
        number, cause = worker.job.number, worker.cause_of_death()
        print(f"trial {number}: its process died ({cause})", flush=True)
        self.next_ask = 0.0
        if not self.study.requeue(number, cause):
            self._finish_trial_of(worker)

    def _finish_trial_of(self, worker: Worker) -> None:
        assert worker.job is not None
        number, worker.job = worker.job.number, None
        self._assign_trials()  # first: the worker need not wait for the line and the metrics of its last trial
        trial = self.study.optuna.get_trials(deepcopy=False)[number]
        if not trial.state.is_finished():
            print(f"trial {number}: taken over by another process, as this one sent no heartbeats", flush=True)
            return
        best = self.study.best
        self.table.print(trial, best)
        self.tracker.log_metrics(report.progress(self.study, trial, best), trial.number)


@contextlib.contextmanager
def _process_name(folder: Path, is_shared: bool) -> Iterator[str]:
    """Locks the study's folder; of a shared study, a name in it that no other process has.

    Raises:
        Failure: another process holds the folder.
    """
    names = (f"{socket.gethostname()}-{number}" for number in itertools.count()) if is_shared else iter(["single"])
    for name in names:
        lock = FileLock(folder / f"lock-{name}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield name
        finally:
            lock.release()
        return
    raise Failure(f"this study is in use by another process ({folder} is locked): wait for it, or stop it")
