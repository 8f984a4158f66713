"""Optuna's samplers and pruners, so that a study that was interrupted suggests what it would have suggested anyway."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from optuna import Study, pruners, samplers
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from src.sweeping.space import SweepConfig, grid

# The first validation says little of where a training ends: the second is the first that may end it.
FIRST_JUDGED = 2

Make = Callable[[int], samplers.BaseSampler]


class PerTrialSampler(samplers.BaseSampler):
    """A sampler that is made anew for each draw, its seed keyed on (study's seed, trial's number, parameter).

    So it has no state of its own: a draw depends on the stored trials and on its place alone, and a study that was
    killed at any point goes on with the very suggestions of one that was not. Optuna's own samplers, seeded, would
    start their random numbers over.
    """

    def __init__(self, make: Make, seed: int) -> None:
        self._make = make
        self._seed = seed

    def _for(self, trial: FrozenTrial, parameter: str = "") -> samplers.BaseSampler:
        key = repr((self._seed, trial.number, parameter)).encode()
        return self._make(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little"))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._for(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._for(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._for(trial)
        sampler.infer_relative_search_space(study, trial)  # where TPE notes which parameters apply together
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._for(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        sampler = self._for(trial)
        if not isinstance(sampler, samplers.GridSampler):  # which would stop Optuna's own loop: there is none here
            sampler.after_trial(study, trial, state, values)


def sampler(config: SweepConfig) -> PerTrialSampler:
    """The sampler that the configuration asks for."""
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    sweep = config.sweep
    conditional = any(parameter.when for parameter in sweep.space.values())
    makers: dict[str, Make] = {
        # The parameters together; those that apply together, where there are conditions.
        "tpe": lambda seed: samplers.TPESampler(seed=seed, multivariate=True, group=conditional),
        "random": lambda seed: samplers.RandomSampler(seed=seed),
        # Its order of the points hangs on its seed, which must therefore be the same for each trial.
        "grid": lambda _: samplers.GridSampler(grid(sweep.space), seed=sweep.seed),
        "gp": lambda seed: samplers.GPSampler(seed=seed, warn_independent_sampling=False),
        # What it can't order (choices, conditions) is drawn at random.
        "cmaes": lambda seed: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    }
    return PerTrialSampler(makers[sweep.sampler], sweep.seed)


def pruner(config: SweepConfig) -> pruners.BasePruner:
    """The pruner that the configuration asks for."""
    match config.sweep.pruner:
        case "median":
            return pruners.MedianPruner(n_warmup_steps=FIRST_JUDGED)
        case "hyperband":
            return pruners.HyperbandPruner(min_resource=1, max_resource=config.trainer.max_epochs)
    return pruners.NopPruner()
