"""The private interfaces of Optuna that sweeps use; checked with Optuna 5.0.0."""

from __future__ import annotations

from optuna import Study
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial


def trial_id(trial: Trial | FrozenTrial) -> int:
    """The trial's id in its storage; public is only its number in the study, which heartbeats do not use."""
    return trial._trial_id


def running_trial(study: Study, trial: Trial | FrozenTrial) -> Trial:
    """A new handle on an unfinished trial of the study, to suggest, report and tell with its old number."""
    return Trial(study, trial._trial_id)


def stale_trial_ids(storage: RDBStorage, study: Study) -> set[int]:
    """The ids of running trials whose last heartbeat is older than the storage's grace period."""
    return set(storage._get_stale_trial_ids(study._study_id))
