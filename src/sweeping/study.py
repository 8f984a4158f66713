"""A stored Optuna study: what was tried, what is under way, what comes next. One process asks and tells.

Stored in SQLite: a transaction is there or not, whenever the process is killed (a journal file with a torn last line no
longer loads), and with a single writer there is nobody to wait for.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from src.config import ROOT, ConfigError, plain
from src.errors import Failure
from src.sweeping import space
from src.sweeping.samplers import pruner, sampler
from src.sweeping.space import SweepConfig

FOLDER = ROOT / "experiments" / "sweeps"
DATABASE = "study.db"
# What a trial carries beside its parameters and values.
OVERRIDES, SECONDS, REASON, KILLS = "overrides", "seconds", "reason", "kills"
# Of the study: what may not change, its run in MLflow, the time that it took so far.
IDENTITY, JOURNAL, SPENT = "identity", "journal", "seconds"


@dataclass(frozen=True)
class Planned:
    """A trial to be trained: its number, and its resolved configuration."""

    number: int
    config: dict[str, Any]


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
        self.optuna = optuna.create_study(
            study_name=config.study,
            storage=f"sqlite:///{folder / DATABASE}",
            sampler=sampler(config),
            pruner=pruner(config),
            directions=["maximize" if mode == "max" else "minimize" for mode in config.objectives.values()],
            load_if_exists=True,
        )
        self._recognise()
        self._budget = config.sweep.trials
        if config.sweep.sampler == "grid":
            self._budget = min(self._budget or 2**31, space.points(space.grid(config.sweep.space)))
        self._live: dict[int, Trial] = {}
        self._again = [trial._trial_id for trial in self.optuna.get_trials(states=(TrialState.RUNNING,))]
        self._spent, self._since = float(self.optuna.user_attrs.get(SPENT, 0.0)), time.monotonic()

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

    def next(self) -> Planned | None:
        """What is to be trained now: first what a killed process left behind, under its old number; None at the end."""
        while self._again or self._within_budget():
            trial = Trial(self.optuna, self._again.pop(0)) if self._again else self.optuna.ask()
            chosen = space.suggested(self.config.sweep.space, trial)
            self._live[trial.number] = trial
            output = (self.folder / "trials" / str(trial.number)).relative_to(ROOT)
            try:
                content = space.configured(self.config.sweep.space, chosen, self.given, str(output)).plain()
            except ConfigError as error:  # each value alone is allowed, these together are not
                self.fail(trial.number, str(error).splitlines()[0])
                continue
            trial.set_user_attr(OVERRIDES, space.assignments(self.config.sweep.space, chosen))
            return Planned(trial.number, content)
        return None

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Keeps a validation's value; whether the trial is to be pruned."""
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
        trial = self._live.pop(number)
        trial.set_user_attr(SECONDS, round(seconds, 3))
        if pruned:
            self._tell(trial, state=TrialState.PRUNED)
        else:
            self._tell(trial, values=list(values), state=TrialState.COMPLETE)

    def fail(self, number: int, reason: str) -> None:
        """A trial failed, and would fail again."""
        trial = self._live.pop(number)
        trial.set_user_attr(REASON, reason)
        self._tell(trial, state=TrialState.FAIL)

    def lost(self, number: int, how: str) -> bool:
        """A trial's process died: the trial is next again, until it was so too often; whether it failed by that."""
        trial = self._live[number]
        kills = int(trial.user_attrs.get(KILLS, 0)) + 1
        trial.set_user_attr(KILLS, kills)
        if kills > self.config.sweep.retries:
            self.fail(number, f"its process died {kills} times ({how})")
            return True
        del self._live[number]
        self._again.insert(0, trial._trial_id)
        return False

    def _tell(self, trial: Trial, **how: Any) -> None:
        self.optuna.tell(trial, **how)
        self.optuna.set_user_attr(SPENT, self._seconds())

    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._since

    def _within_budget(self) -> bool:
        if self._budget is not None and len(self.optuna.get_trials(deepcopy=False)) >= self._budget:
            return False
        minutes = self.config.sweep.minutes
        return minutes is None or self._seconds() < 60 * minutes

    def _recognise(self) -> None:
        """Raises Failure where the stored study is another one than the configuration asks for."""
        config = self.config.plain()
        config["trainer"].pop("threads")  # the workers' number decides
        for key in ("output", "evaluation", "export", "description"):
            config.pop(key)
        fixed = ("space", "sampler", "pruner", "seed")
        searched = {key: value for key, value in plain(self.config.sweep).items() if key in fixed}
        now = _flat({**config, "sweep": searched, "objectives": self.config.objectives})
        before = self.optuna.user_attrs.get(IDENTITY)
        if before is None:
            self.optuna.set_user_attr(IDENTITY, now)
            self.optuna.set_user_attr(JOURNAL, uuid.uuid4().hex)
        elif before != now:
            differs = [
                f"{key} was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)
            ]
            raise Failure(
                f"the study {self.config.study} is another: {'; '.join(differs)}. Give this one its own name, "
                f"sweep.study=NAME, or remove {self.folder.relative_to(ROOT)}"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: json.dumps(value, sort_keys=True)}
    return flat
