"""A stored Optuna study: what was tried, what is under way, what comes next.

One process of a machine asks and tells; where the storage is shared, several such processes on any machines. Each owns
the trials that it was given, until it is silent for too long.
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
from src.sweeping import space, storage
from src.sweeping.samplers import pruner, sampler
from src.sweeping.space import SweepConfig

FOLDER = ROOT / "experiments" / "sweeps"
# What a trial carries beside its parameters and values; the owner is the process that trains it, none: up for grabs.
OVERRIDES, SECONDS, REASON, KILLS, OWNER = "overrides", "seconds", "reason", "kills", "owner"
# Of the study: what may not change, its run in MLflow, the time that it took so far.
IDENTITY, JOURNAL, SPENT = "identity", "journal", "seconds"

ASKING = "ask"  # what the storage's lock is held for: so that the count of trials is exact, and each has one owner


@dataclass(frozen=True)
class Planned:
    """A trial to be trained: its number, and its resolved configuration."""

    number: int
    config: dict[str, Any]
    inherited: bool  # from another process, which died


class Study:
    """The study that a configuration names, begun or gone on with."""

    def __init__(self, config: SweepConfig, given: Sequence[str], folder: Path) -> None:
        """`given`: the overrides that all trials share; `folder`: the study's own.

        Raises:
            Failure: a study of this name searches something else.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config = config
        self.given = list(given)
        self.folder = folder
        self.storage = storage.opened(config.sweep, config.study, folder)
        with self.storage.lock(ASKING):
            self.optuna = optuna.create_study(
                study_name=config.study,
                storage=self.storage.backend,
                sampler=sampler(config),
                pruner=pruner(config),
                directions=["maximize" if mode == "max" else "minimize" for mode in config.objectives.values()],
                load_if_exists=True,
            )
            self._recognise()
        self._budget = config.sweep.trials
        if config.sweep.sampler == "grid":
            self._budget = min(self._budget or 2**31, space.points(space.grid(config.sweep.space)))
        self._name = uuid.uuid4().hex  # of this process, as an owner
        self._live: dict[int, Trial] = {}
        self._again: list[Trial] = []
        self._since = time.monotonic()
        self._left = threading.Event()
        if self.storage.shared:
            threading.Thread(target=self._beat, name="sweep-heartbeat", daemon=True).start()

    @property
    def journal(self) -> str:
        """The identity of the journal of the study's run in MLflow."""
        return str(self.optuna.user_attrs[JOURNAL])

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those that came to an end, in the order of their numbers."""
        return [trial for trial in self.optuna.trials if trial.state.is_finished()]

    @property
    def best(self) -> list[FrozenTrial]:
        """The best trial, or the Pareto front, the best in the first objective first; none before a trial is whole."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.optuna.get_trials(deepcopy=False)):
            return []
        if len(self.config.objectives) == 1:
            return [self.optuna.best_trial]
        sign = -1 if next(iter(self.config.objectives.values())) == "max" else 1
        return sorted(self.optuna.best_trials, key=lambda trial: (sign * trial.values[0], trial.number))

    @property
    def startable(self) -> float:
        """How many trials could be started now, as far as is known before asking; infinite without a number."""
        whole = len(self.optuna.get_trials(deepcopy=False))
        new = float("inf") if self._budget is None else max(0, self._budget - whole)
        return len(self._again) + len(self._abandoned()) + (new if self._within_minutes() else 0)

    @property
    def elsewhere(self) -> bool:
        """Whether other processes are training trials, or were when they died."""
        return bool(self._others())

    def next(self) -> Planned | None:
        """What is to be trained now: first what was left behind, under its old number; None if there is nothing now."""
        while found := self._ask():
            trial, inherited = found
            chosen = space.suggested(self.config.sweep.space, trial)
            output = (self.folder / "trials" / str(trial.number)).relative_to(ROOT)
            try:
                content = space.configured(self.config.sweep.space, chosen, self.given, str(output)).plain()
            except ConfigError as error:  # each value alone is allowed, these together are not
                self.fail(trial.number, str(error).splitlines()[0])
                continue
            trial.set_user_attr(OVERRIDES, space.assignments(self.config.sweep.space, chosen))
            return Planned(trial.number, content, inherited)
        return None

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Keeps a validation's value; whether the trial is to be pruned, or is another process's by now."""
        if not self._owns(number):
            return True
        if len(self.config.objectives) > 1:
            return False
        trial = self._live[number]
        known = self.optuna.get_trials(deepcopy=False)[number].intermediate_values
        if epoch not in known:
            trial.report(value, epoch)
        # A trial that goes on after a kill passes where it was already: it was not pruned there.
        return not any(later > epoch for later in known) and trial.should_prune()

    def end(self, number: int, values: Sequence[float], *, pruned: bool, seconds: float) -> None:
        """A trial came to its end."""
        how = {"state": TrialState.PRUNED} if pruned else {"values": list(values), "state": TrialState.COMPLETE}
        self._tell(number, {SECONDS: round(seconds, 3)}, **how)

    def fail(self, number: int, reason: str) -> None:
        """A trial failed, and would fail again."""
        self._tell(number, {REASON: reason}, state=TrialState.FAIL)

    def lost(self, number: int, how: str) -> bool:
        """A trial's process died: the trial is next again, until it was so too often; whether it is over by that."""
        with self.storage.lock(ASKING):
            trial = self._live.pop(number)
            if not self._owns(number) or self._died_too_often(trial, how):
                return True
            self._again.insert(0, trial)
            return False

    def put_back(self, number: int) -> None:
        """A trial is next again: whoever trained it was asked by somebody else to stop."""
        self._again.insert(0, self._live.pop(number))

    def leave(self) -> None:
        """Gives up what is unfinished, for whoever asks next."""
        self._left.set()
        if self.storage.shared:
            for trial in [*self._live.values(), *self._again]:
                with self.storage.lock(ASKING):
                    if self._owns(trial.number):
                        trial.set_user_attr(OWNER, "")

    def _ask(self) -> tuple[Trial, bool] | None:
        """A trial, and whether it was another process's: one of ours to be tried again, an abandoned one, a new one."""
        while self._again:
            trial = Trial(self.optuna, self._again.pop(0)._trial_id)
            if self._owns(trial.number):
                self._live[trial.number] = trial
                return trial, False
        with self.storage.lock(ASKING):
            for found in self._abandoned():
                trial = Trial(self.optuna, found._trial_id)
                inherited = self.storage.shared and bool(found.user_attrs.get(OWNER))
                if not (inherited and self._died_too_often(trial, "with the sweep's own process, or its machine")):
                    return self._own(trial), inherited
            return (self._own(self.optuna.ask()), False) if self._within_budget() else None

    def _own(self, trial: Trial) -> Trial:
        if self.storage.shared:
            self.storage.beat(trial._trial_id)
            trial.set_user_attr(OWNER, self._name)
        self._live[trial.number] = trial
        return trial

    def _owns(self, number: int) -> bool:
        """False where another process took the trial over: this one was silent for too long."""
        if not self.storage.shared:
            return True
        trial = self.optuna.get_trials(deepcopy=False)[number]
        return not trial.state.is_finished() and trial.user_attrs.get(OWNER) == self._name

    def _others(self) -> list[FrozenTrial]:
        running = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ours = self._live.keys() | {trial.number for trial in self._again}
        return [trial for trial in running if trial.number not in ours]

    def _abandoned(self) -> list[FrozenTrial]:
        if not (others := self._others()):
            return []
        silent = self.storage.silent(self.optuna)
        return [trial for trial in others if not trial.user_attrs.get(OWNER) or trial._trial_id in silent]

    def _died_too_often(self, trial: Trial, how: str) -> bool:
        kills = int(trial.user_attrs.get(KILLS, 0)) + 1
        trial.set_user_attr(KILLS, kills)
        if kills > self.config.sweep.retries:
            self._finish(trial, {REASON: f"its process died {kills} times ({how})"}, state=TrialState.FAIL)
            return True
        return False

    def _tell(self, number: int, known: Mapping[str, Any], **how: Any) -> None:
        with self.storage.lock(ASKING):
            trial = self._live.pop(number)
            if self._owns(number):
                self._finish(trial, known, **how)

    def _finish(self, trial: Trial, known: Mapping[str, Any], **how: Any) -> None:
        for key, value in known.items():
            trial.set_user_attr(key, value)
        self.optuna.tell(trial, **how)
        seconds, self._since = self._seconds(), time.monotonic()
        self.optuna.set_user_attr(SPENT, seconds)

    def _seconds(self) -> float:
        """What all processes spent on the study, added up."""
        return float(self.optuna.user_attrs.get(SPENT, 0.0)) + time.monotonic() - self._since

    def _within_budget(self) -> bool:
        if self._budget is not None and len(self.optuna.get_trials(deepcopy=False)) >= self._budget:
            return False
        return self._within_minutes()

    def _within_minutes(self) -> bool:
        minutes = self.config.sweep.minutes
        return minutes is None or self._seconds() < 60 * minutes

    def _beat(self) -> None:
        """The thread that says of each trial that this process has that it is alive."""
        while not self._left.wait(self.config.sweep.heartbeat_s):
            for trial in [*self._live.values(), *self._again]:
                with contextlib.suppress(Exception):  # the next one may get through; who asks says what is wrong
                    self.storage.beat(trial._trial_id)

    def _recognise(self) -> None:
        """Raises Failure where the stored study is another one than the configuration asks for."""
        config = self.config.plain()
        config["trainer"].pop("threads")  # the workers' number decides
        for key in ("output", "evaluation", "export", "description"):
            config.pop(key)
        asked = {**config, "sweep": self.config.search, "objectives": self.config.objectives}
        now = described(asked)
        before = self.optuna.user_attrs.get(IDENTITY)
        if before is None:
            self.optuna.set_user_attr(IDENTITY, now)
            self.optuna.set_user_attr(JOURNAL, uuid.uuid4().hex)
        elif before != now:
            remove = "" if self.storage.shared else f", or remove {self.folder.relative_to(ROOT)}"
            raise Failure(
                f"the study {self.config.study} is another: {'; '.join(differences(before, now))}. "
                f"Give this one its own name, sweep.study=NAME{remove}"
            )
