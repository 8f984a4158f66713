"""Results of a sweep: lines while it runs, then a table, plots and the best trials as files for `src.adopt`."""

from __future__ import annotations

import importlib
import shlex
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from src.common.errors import Failure
from src.common.files import write_text_atomically
from src.common.paths import ROOT
from src.common.yaml_files import dump_yaml
from src.configuration.composing import as_assignments, overrides_of
from src.reporting import sweeps, tables
from src.reporting.sweeps import Point
from src.sweeping.space import SweepConfig, nested
from src.sweeping.study import OVERRIDES, REASON, SECONDS, Study
from src.tracking.tracker import Tracker

BEST, TRIALS = "best.yaml", "trials.csv"
# Keys that do not belong into params.yaml: they say where a trial ran and what it is called.
NOT_ADOPTED = ("experiment", "profile", "trainer", "debug", "sweep", "output", "trainer.threads")

BEST_SHARE = 0.25  # share of the trials that importance compares with all others
MOST_REASONS = 3  # different ones that are printed where all trials failed
MIN_VALUES = 4  # different values without which there is no best quarter


class Table:
    """Prints a line for each finished trial."""

    def __init__(self, study: Study) -> None:
        """Prints the head."""
        config = study.config
        limits = ((config.sweep.trials, "trials"), (config.sweep.minutes, "minutes"))
        budget = " or ".join(f"{amount:g} {unit}" for amount, unit in limits if amount)
        ended = len(study.trials)
        resumed = f", {ended} of them have ended" if ended else ""
        print(f"study {config.study}: {config.sweep.sampler}, {budget}{resumed}", flush=True)
        self.objectives = list(config.objectives)
        head = "".join(f"{name:>14}" for name in self.objectives)
        print(f"{'trial':>5}  {'state':8}{head}{'seconds':>9}  parameters", flush=True)

    def print(self, trial: FrozenTrial, best: Sequence[FrozenTrial]) -> None:
        """Prints the trial's line, with a star if it is one of the `best`."""
        point = _point(trial)
        missing = len(self.objectives) - len(point.values)
        values = "".join(f"{value:>14.5g}" for value in point.values) + " " * 14 * missing
        seconds = trial.user_attrs.get(SECONDS)
        time = f"{seconds:9.1f}" if seconds is not None else " " * 9
        star = "* " if any(trial.number == other.number for other in best) else ""
        parameters = " ".join(f"{_short(key)}={_format(value)}" for key, value in trial.params.items())
        comment = trial.user_attrs.get(REASON) or parameters
        print(f"{trial.number:>5}  {point.state:8}{values}{time}  {star}{comment}", flush=True)


def import_plotting() -> None:
    """Imports what `write` needs, while the workers import the training code."""
    for name in ("matplotlib.backends.backend_agg", "optuna.importance"):
        importlib.import_module(name)


def parameters(config: SweepConfig) -> dict[str, Any]:
    """The parameters of the sweep's run in MLflow: all that may not change while the study exists."""
    sweep = config.search
    for key, ranges in sweep["space"].items():
        sweep["space"][key] = ", ".join(
            name if value is True else f"{name} {value}" for name, value in ranges.items() if value
        )
    return {"sweep": sweep | {"objectives": dict(config.objectives)}, "name": config.name, "seed": config.seed}


def progress(study: Study, trial: FrozenTrial, best: Sequence[FrozenTrial]) -> dict[str, float]:
    """A trial's values and the best so far, as metrics of the sweep's run in MLflow."""
    objectives = list(study.config.objectives)
    metrics = dict(zip(objectives, _point(trial).values, strict=False))
    if len(objectives) == 1 and best:
        metrics[f"best_{objectives[0]}"] = best[0].values[0]
    return metrics


def write(study: Study, tracker: Tracker) -> None:
    """Writes the results into the study's folder and the sweep's run in MLflow; prints how to use the best trial."""
    folder, config = study.folder, study.config
    tables.write_csv(folder / TRIALS, [_row(trial, list(config.objectives)) for trial in study.trials])
    tracker.log_artifact(folder / TRIALS)
    best = study.best
    if not best:
        return
    for path in _plots(study):
        tracker.log_artifact(path, "plots")
    for trial in best:
        target = folder / BEST if trial.number == best[0].number else folder / "front" / f"{trial.number}.yaml"
        target.parent.mkdir(exist_ok=True)
        write_text_atomically(target, _as_overrides_file(study, trial))
        tracker.log_artifact(target, "front" if target.parent != folder else None)
    values = dict(zip(config.objectives, best[0].values, strict=True))
    tracker.set_tags(
        {f"best.{key}": _format(value) for key, value in best[0].params.items()}
        | {f"best.{name}": f"{value:.6g}" for name, value in values.items()}
        | {"best.trial": str(best[0].number), "mlflow.note.content": _description(study, best[0])}
    )
    line = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
    path = (folder / BEST).relative_to(ROOT)
    print(f"best: trial {best[0].number}, {line}; to train it, or to make it the configuration of `dvc repro`:")
    print(f"  {_train_command(study, best[0])}")
    print(f"  python -m src.adopt {config.name} {path}", flush=True)


def refuse_total_failure(study: Study) -> None:
    """Raises Failure, with the reasons counted, if trials have ended and all of them failed."""
    trials = study.trials
    if trials and all(trial.state == TrialState.FAIL for trial in trials):
        folder = (study.folder / "trials").relative_to(ROOT)
        counts = Counter(str(trial.user_attrs.get(REASON)) for trial in trials).most_common()
        reasons = [f"{count} x {reason}" for reason, count in counts[:MOST_REASONS]]
        others = sum(count for _, count in counts[MOST_REASONS:])
        more = f"; {others} x other reasons" if others else ""
        raise Failure(f"all {len(trials)} trials failed: {'; '.join(reasons)}{more} (logs: {folder}/*/log.txt)")


def _plots(study: Study) -> list[Path]:
    config, folder = study.config, study.folder / "plots"
    folder.mkdir(exist_ok=True)
    points = [_point(trial) for trial in study.trials]
    objective, mode = next(iter(config.objectives.items()))
    style: dict[str, Any] = {"label": f"{config.study} · {config.sweep.sampler}", "sample": config.sample}
    logarithmic = [name for name, parameter in config.sweep.space.items() if parameter.log]
    paths = [folder / "history.png", folder / "parallel.png"]
    sweeps.history(points, paths[0], objective=objective, mode=mode, **style)
    sweeps.parallel(points, paths[1], logarithmic=logarithmic, objective=objective, mode=mode, **style)
    if shares := _importance(study):
        paths.append(folder / "importance.png")
        sweeps.importance(shares, paths[-1], objective=objective, **style)
    if len(config.objectives) > 1:
        paths.append(folder / "pareto.png")
        front = [trial.number for trial in study.best]
        sweeps.pareto(points, front, paths[-1], objectives=list(config.objectives), **style)
    return paths


def _importance(study: Study) -> dict[str, float]:
    """Importance of each parameter for being among the best trials (PED-ANOVA, Watanabe et al., 2023); sums to 1.

    With several objectives the best trials are those nearest to the front. Empty with too few different values.
    """
    complete = study.optuna.get_trials(states=(TrialState.COMPLETE,))
    if len({tuple(trial.values) for trial in complete}) < MIN_VALUES:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some regimes for parameter")  # a condition that few trials met
        return optuna.importance.get_param_importances(study.optuna, evaluator=evaluator)


def _as_overrides_file(study: Study, trial: FrozenTrial) -> str:
    """A trial as nested overrides for params.yaml, with comments on its origin."""
    config = study.config
    values = ", ".join(f"{name} {v:.6g}" for name, v in zip(config.objectives, trial.values, strict=True))
    comments = [
        f"Trial {trial.number} of {len(study.trials)} of the study {config.study}: {values}.",
        f"From: python -m src.sweep {shlex.join(study.overrides)}",
        f"To train it: {_train_command(study, trial)}",
        f"To copy it to experiments.{config.name}.overrides in params.yaml: "
        f"python -m src.adopt {config.name} PATH_OF_THIS_FILE; dvc repro",
    ]
    content = nested(_shared_assignments(study.overrides) | trial.user_attrs[OVERRIDES])
    return "".join(f"# {line}\n" for line in comments) + dump_yaml(content, allow_unicode=True)


def _train_command(study: Study, trial: FrozenTrial) -> str:
    """The command that trains a trial again, to the same bits."""
    overrides = [*study.overrides, *overrides_of(nested(trial.user_attrs[OVERRIDES]))]
    threads = study.config.threads_per_trial
    if threads is not None and study.config.trainer.threads is None:
        overrides.append(f"trainer.threads={threads}")
    return shlex.join(["python", "-m", "src.train", *overrides])


def _shared_assignments(overrides: Sequence[str]) -> dict[str, Any]:
    """The values that the overrides of all trials set, by dotted key, for params.yaml."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(as_assignments(list(overrides))):
        key = override.key_or_group
        if not override.is_delete() and key not in NOT_ADOPTED and not key.startswith("hydra"):
            values = {k: v for k, v in values.items() if not k.startswith(f"{key}.")} | {key: override.value()}
    return values


def _description(study: Study, best: FrozenTrial) -> str:
    """The text on the page of the sweep's run in MLflow."""
    config = study.config
    rows = [{"parameter": key, "best": _format(value)} for key, value in best.params.items()]
    values = ", ".join(f"{name} **{v:.5g}**" for name, v in zip(config.objectives, best.values, strict=True))
    states = [_point(trial).state for trial in study.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "fail"))
    return (
        f"Sweep of {config.name} ({config.profile.note}): {counts}. Best is trial {best.number}: {values}.\n\n"
        + tables.markdown(rows, ["parameter", "best"])
    )


def _row(trial: FrozenTrial, objectives: Sequence[str]) -> dict[str, Any]:
    point = _point(trial)
    return (
        {"trial": trial.number, "state": point.state}
        | dict(zip(objectives, point.values, strict=False))
        | {"seconds": trial.user_attrs.get(SECONDS)}
        | dict(trial.params)
        | {"reason": trial.user_attrs.get(REASON)}
    )


def _point(trial: FrozenTrial) -> Point:
    values = tuple(trial.values or ())
    if trial.state == TrialState.PRUNED and trial.intermediate_values:
        values = (trial.intermediate_values[max(trial.intermediate_values)],)
    return Point(trial.number, trial.state.name.lower(), values, trial.params)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(key: str) -> str:
    """A key without its usual prefixes."""
    return key.removeprefix("model.").removeprefix("data.").removeprefix("loader.").removeprefix("optimizer.")
