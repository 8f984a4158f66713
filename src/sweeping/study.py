"""A stored Optuna study: suggests trials, keeps their results, and requeues what a dead process left.

One process asks and tells; of a shared study several, on any machines. Each owns the trials that it trains, as long as
it sends heartbeats.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from src.common.errors import ConfigError, Failure
from src.common.identity import described, differences
from src.common.paths import ROOT
from src.configuration.fingerprints import stage_code
from src.configuration.schema import RECORD_KEYS
from src.sweeping import space, storage
from src.sweeping.optuna_internals import running_trial, trial_id
from src.sweeping.samplers import pruner, sampler
from src.sweeping.space import SweepConfig

FOLDER = ROOT / "experiments" / "sweeps"
# User attributes of a trial; the owner is the process that trains it, '' a trial that any process may continue.
OVERRIDES, SECONDS, REASON, DEATHS, OWNER = "overrides", "seconds", "reason", "kills", "owner"
# User attributes of the study: what may not change, the journal of its run in MLflow, the time spent on it so far.
IDENTITY, JOURNAL, SPENT_S = "identity", "journal", "seconds"

ASK_LOCK = "ask"  # purpose of the storage's lock that makes the count of trials exact and gives each trial one owner


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to be trained: its number and its resolved configuration."""

    number: int
    config: dict[str, Any]
    is_taken_over: bool  # from another process, which died


class Study:
    """The study that a configuration names, new or resumed."""

    def __init__(self, config: SweepConfig, overrides: Sequence[str], folder: Path) -> None:
        """`overrides`: Hydra's, of all trials; `folder`: the study's own.

        Raises:
            Failure: a study of this name searches something else, or its storage can't be opened.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config = config
        self.overrides = list(overrides)
        self.folder = folder
        self.storage = storage.open_storage(config.sweep, config.study, folder)
        with self.storage.lock(ASK_LOCK):
            self.optuna = optuna.create_study(
                study_name=config.study,
                storage=self.storage.backend,
                sampler=sampler(config),
                pruner=pruner(config),
                directions=["maximize" if mode == "max" else "minimize" for mode in config.objectives.values()],
                load_if_exists=True,
            )
            self._check_identity()
        self._budget = config.sweep.trials
        if config.sweep.sampler == "grid":
            self._budget = min(self._budget or 2**31, space.count_points(space.grid(config.sweep.space)))
        self._process_id = uuid.uuid4().hex  # as an owner
        self._running: dict[int, Trial] = {}
        self._queue: list[Trial] = []  # trials of dead workers, to be trained again
        self._last_update = time.monotonic()
        self._is_released = threading.Event()
        if self.storage.is_shared:
            threading.Thread(target=self._send_heartbeats, name="sweep-heartbeat", daemon=True).start()

    @property
    def journal(self) -> str:
        """The id of the journal of the study's run in MLflow."""
        return str(self.optuna.user_attrs[JOURNAL])

    @property
    def trials(self) -> list[FrozenTrial]:
        """The finished trials, by number."""
        return [trial for trial in self.optuna.trials if trial.state.is_finished()]

    @property
    def best(self) -> list[FrozenTrial]:
        """The best trial, or the Pareto front, best in the first objective first; empty without a complete trial."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.optuna.get_trials(deepcopy=False)):
            return []
        if len(self.config.objectives) == 1:
            return [self.optuna.best_trial]
        sign = -1 if next(iter(self.config.objectives.values())) == "max" else 1
        return sorted(self.optuna.best_trials, key=lambda trial: (sign * trial.values[0], trial.number))

    @property
    def has_trials_to_start(self) -> bool:
        """Whether `next_trial` would probably return one."""
        return bool(self._queue or self._abandoned()) or self._is_within_budget()

    @property
    def is_in_use_elsewhere(self) -> bool:
        """Whether trials of other processes are unfinished; those processes may be dead."""
        return bool(self._trials_of_others())

    def next_trial(self) -> PlannedTrial | None:
        """The next trial to be trained, unfinished ones first, under their old numbers; None if there is none now."""
        while assignment := self._ask():
            trial, is_taken_over = assignment
            suggestions = space.suggest(self.config.sweep.space, trial)
            output = (self.folder / "trials" / str(trial.number)).relative_to(ROOT)
            try:
                content = space.trial_config(self.config.sweep.space, suggestions, self.overrides, str(output)).plain()
            except ConfigError as error:  # each value alone is allowed, these together are not
                self.fail(trial.number, str(error).splitlines()[0])
                continue
            if content["trainer"]["threads"] is None:
                content["trainer"]["threads"] = self.config.threads_per_trial
            trial.set_user_attr(OVERRIDES, space.assignments(self.config.sweep.space, suggestions))
            return PlannedTrial(trial.number, content, is_taken_over)
        return None

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Stores the value of a validation; returns whether the trial is to end: pruned, or taken over by a process."""
        if not self._owns(number):
            return True
        if len(self.config.objectives) > 1:
            return False
        trial = self._running[number]
        reported = self.optuna.get_trials(deepcopy=False)[number].intermediate_values
        if epoch not in reported:
            trial.report(value, epoch)
        # A resumed trial repeats epochs that it was not pruned after.
        return not any(later > epoch for later in reported) and trial.should_prune()

    def end(self, number: int, values: Sequence[float], *, pruned: bool, seconds: float) -> None:
        """Finishes a trial that is complete or was pruned."""
        result = {"state": TrialState.PRUNED} if pruned else {"values": list(values), "state": TrialState.COMPLETE}
        self._tell(number, {SECONDS: round(seconds, 3)}, **result)

    def fail(self, number: int, reason: str) -> None:
        """Finishes a trial that failed, and would fail again."""
        self._tell(number, {REASON: reason}, state=TrialState.FAIL)

    def requeue(self, number: int, cause: str) -> bool:
        """Requeues the trial of a dead worker; returns False if it died too often, or is another process's by now."""
        with self.storage.lock(ASK_LOCK):
            trial = self._running.pop(number)
            if not self._owns(number) or self._died_too_often(trial, cause):
                return False
            self._queue.append(trial)
            return True

    def release(self) -> None:
        """Gives up the ownership of unfinished trials, so that other processes continue them at once."""
        self._is_released.set()
        if self.storage.is_shared:
            for trial in [*self._running.values(), *self._queue]:
                with self.storage.lock(ASK_LOCK):
                    if self._owns(trial.number):
                        trial.set_user_attr(OWNER, "")

    def _ask(self) -> tuple[Trial, bool] | None:
        """A requeued, an abandoned or a new trial, in this order; and whether it was taken over from a dead process."""
        while self._queue:
            trial = running_trial(self.optuna, self._queue.pop(0))
            if self._owns(trial.number):
                self._running[trial.number] = trial
                return trial, False
        with self.storage.lock(ASK_LOCK):
            for abandoned in self._abandoned():
                trial = running_trial(self.optuna, abandoned)
                is_taken_over = self.storage.is_shared and bool(abandoned.user_attrs.get(OWNER))
                if not (is_taken_over and self._died_too_often(trial, "with the sweep's own process, or its machine")):
                    return self._own(trial), is_taken_over
            return (self._own(self.optuna.ask()), False) if self._is_within_budget() else None

    def _own(self, trial: Trial) -> Trial:
        if self.storage.is_shared:
            self.storage.record_heartbeat(trial_id(trial))
            trial.set_user_attr(OWNER, self._process_id)
        self._running[trial.number] = trial
        return trial

    def _owns(self, number: int) -> bool:
        """False if another process took the trial over, because this one sent no heartbeats for too long."""
        if not self.storage.is_shared:
            return True
        trial = self.optuna.get_trials(deepcopy=False)[number]
        return not trial.state.is_finished() and trial.user_attrs.get(OWNER) == self._process_id

    def _trials_of_others(self) -> list[FrozenTrial]:
        running = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        own = self._running.keys() | {trial.number for trial in self._queue}
        return [trial for trial in running if trial.number not in own]

    def _abandoned(self) -> list[FrozenTrial]:
        if not (others := self._trials_of_others()):
            return []
        stale = self.storage.stale_trials(self.optuna)
        return [trial for trial in others if not trial.user_attrs.get(OWNER) or trial_id(trial) in stale]

    def _died_too_often(self, trial: Trial, cause: str) -> bool:
        """Counts a death of the trial's process; fails the trial when `sweep.retries` are used up."""
        deaths = int(trial.user_attrs.get(DEATHS, 0)) + 1
        trial.set_user_attr(DEATHS, deaths)
        if deaths > self.config.sweep.retries:
            self._finish(trial, {REASON: f"its process died {deaths} times ({cause})"}, state=TrialState.FAIL)
            return True
        return False

    def _tell(self, number: int, attributes: Mapping[str, Any], **result: Any) -> None:
        with self.storage.lock(ASK_LOCK):
            trial = self._running.pop(number)
            if self._owns(number):
                self._finish(trial, attributes, **result)

    def _finish(self, trial: Trial, attributes: Mapping[str, Any], **result: Any) -> None:
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        self.optuna.tell(trial, **result)
        seconds, self._last_update = self._spent_s(), time.monotonic()
        self.optuna.set_user_attr(SPENT_S, seconds)

    def _spent_s(self) -> float:
        """Seconds that all processes spent on the study, added up."""
        return float(self.optuna.user_attrs.get(SPENT_S, 0.0)) + time.monotonic() - self._last_update

    def _is_within_budget(self) -> bool:
        if self._budget is not None and len(self.optuna.get_trials(deepcopy=False)) >= self._budget:
            return False
        minutes = self.config.sweep.minutes
        return minutes is None or self._spent_s() < 60 * minutes

    def _send_heartbeats(self) -> None:
        while not self._is_released.wait(storage.HEARTBEAT_S):
            for trial in [*self._running.values(), *self._queue]:
                with contextlib.suppress(Exception):  # the main thread reports a lost storage; the next may arrive
                    self.storage.record_heartbeat(trial_id(trial))

    def _check_identity(self) -> None:
        """Raises Failure if the stored study differs from the configuration; stores the identity of a new one."""
        config = self.config.record()
        config["trainer"].pop("threads")  # the number of workers decides
        for key in (*RECORD_KEYS, "evaluation", "export", "description"):
            config.pop(key)
        code = stage_code("train", self.config)
        identity = described({**config, "sweep": self.config.search, "objectives": self.config.objectives})
        identity |= {**code.modules, **{f"package {name}": version for name, version in code.packages.items()}}
        stored = self.optuna.user_attrs.get(IDENTITY)
        if stored is None:
            self.optuna.set_user_attr(IDENTITY, identity)
            self.optuna.set_user_attr(JOURNAL, uuid.uuid4().hex)
        elif stored != identity:
            remedy = "" if self.storage.is_shared else f", or remove {self.folder.relative_to(ROOT)}"
            raise Failure(
                f"the study {self.config.study} is another: {'; '.join(differences(stored, identity))}. "
                f"Give this one its own name, sweep.study=NAME{remedy}"
            )
