"""Optuna's samplers and pruner; a resumed study gets the suggestions of an uninterrupted one."""

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

# The first validation predicts little of the last one: trials are pruned from the second on.
PRUNER_WARMUP_EPOCHS = 2

SamplerFactory = Callable[[int], samplers.BaseSampler]


class PerTrialSampler(samplers.BaseSampler):
    """A sampler without state: for each draw it creates Optuna's, seeded with (study's seed, trial number, parameter).

    So a draw depends on the stored trials, the trial's number and the parameter only, and a study that was killed at
    any moment continues with the suggestions of an uninterrupted one. Optuna's samplers with a fixed seed would start
    their random numbers over.
    """

    def __init__(self, factory: SamplerFactory, seed: int) -> None:
        self._factory = factory
        self._seed = seed

    def _for(self, trial: FrozenTrial, parameter: str = "") -> samplers.BaseSampler:
        key = repr((self._seed, trial.number, parameter)).encode()
        return self._factory(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little"))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._for(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._for(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._for(trial)
        sampler.infer_relative_search_space(study, trial)  # TPE stores here which parameters apply together
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._for(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        sampler = self._for(trial)
        if not isinstance(sampler, samplers.GridSampler):  # which would stop the loop of `study.optimize`
            sampler.after_trial(study, trial, state, values)


def sampler(config: SweepConfig) -> PerTrialSampler:
    """Returns the sampler `sweep.sampler`."""
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    sweep = config.sweep
    conditional = any(parameter.when for parameter in sweep.space.values())
    factories: dict[str, SamplerFactory] = {
        # Multivariate; with conditions, in groups of parameters that apply together.
        "tpe": lambda seed: samplers.TPESampler(seed=seed, multivariate=True, group=conditional),
        "random": lambda seed: samplers.RandomSampler(seed=seed),
        # The seed decides the order of the points: it must be the same for all trials.
        "grid": lambda _: samplers.GridSampler(grid(sweep.space), seed=sweep.seed),
        "gp": lambda seed: samplers.GPSampler(seed=seed, warn_independent_sampling=False),
        # Choices and conditional parameters are drawn at random.
        "cmaes": lambda seed: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    }
    return PerTrialSampler(factories[sweep.sampler], sweep.seed)


def pruner(config: SweepConfig) -> pruners.BasePruner:
    """Returns the pruner `sweep.pruner`."""
    if config.sweep.pruner == "median":
        return pruners.MedianPruner(n_warmup_steps=PRUNER_WARMUP_EPOCHS)
    return pruners.NopPruner()
