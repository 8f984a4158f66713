"""What a sweep leaves: a table, pictures, one interactive page, and the best trial as a file that trains again."""

from __future__ import annotations

import importlib
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from src.common.paths import ROOT
from src.configuration.composing import as_assignments
from src.reporting import sweeps, tables
from src.reporting.sweeps import Point
from src.sweeping.space import SweepConfig, nested
from src.sweeping.study import OVERRIDES, REASON, SECONDS, Study
from src.tracking.tracker import Tracker

BEST, TRIALS, PAGE = "best.yaml", "trials.csv", "study.html"
# Where a trial ran and what it was called; what it computed does not hang on them.
CIRCUMSTANCES = ("experiment", "profile", "trainer", "debug", "sweep", "output", "trainer.threads")

BEST_SHARE = 0.25  # of the trials are "the best" that parameters set apart
ENOUGH = 4  # different values, for a quarter of them to be one


class Table:
    """A line for each trial that came to an end, as it does."""

    def __init__(self, study: Study) -> None:
        self.study = study
        config = study.config
        trials, minutes = config.sweep.trials, config.sweep.minutes
        budget = " or ".join(
            f"{amount:g} {unit}" for amount, unit in ((trials, "trials"), (minutes, "minutes")) if amount
        )
        ended = len(study.trials)
        gone = f", {ended} of them have ended" if ended else ""
        print(f"study {config.study}: {config.sweep.sampler}, {budget}{gone}", flush=True)
        self.objectives = list(config.objectives)
        head = "".join(f"{name:>14}" for name in self.objectives)
        print(f"{'trial':>5}  {'state':8}{head}{'seconds':>9}  parameters", flush=True)

    def print(self, trial: FrozenTrial, best: Sequence[FrozenTrial]) -> None:
        """The trial's line; `best`: the best of all, of which it may be one."""
        point = _point(trial)
        values = [*map("{:>14.5g}".format, point.values), *[f"{'':14}"] * len(self.objectives)][: len(self.objectives)]
        seconds = trial.user_attrs.get(SECONDS)
        among = any(trial.number == each.number for each in best)
        told = trial.user_attrs.get(REASON) or " ".join(f"{_short(k)}={_text(v)}" for k, v in trial.params.items())
        time = f"{seconds:9.1f}" if seconds is not None else f"{'':9}"
        print(f"{trial.number:>5}  {point.state:8}{''.join(values)}{time}  {'* ' * among}{told}", flush=True)


def warm() -> None:
    """Imports what `write` needs: while the workers import theirs it costs no time, at the end it would."""
    for name in (
        "matplotlib.backends.backend_agg",
        "optuna.importance._fanova",  # and with it scikit-learn
        "optuna.visualization",
        "plotly.graph_objects",
    ):
        importlib.import_module(name)


def parameters(config: SweepConfig) -> dict[str, Any]:
    """What the sweep's run in MLflow has as parameters: what stays the same for as long as the study lives."""
    sweep = config.search
    for key, searched in sweep["space"].items():
        sweep["space"][key] = ", ".join(
            how if value is True else f"{how} {value}" for how, value in searched.items() if value
        )
    return {"sweep": sweep | {"objectives": dict(config.objectives)}, "name": config.name, "seed": config.seed}


def progress(study: Study, trial: FrozenTrial, best: Sequence[FrozenTrial]) -> dict[str, float]:
    """A trial's values, and the best so far, as points at its number."""
    objectives = list(study.config.objectives)
    found = dict(zip(objectives, _point(trial).values, strict=False))
    if len(objectives) == 1 and best:
        found[f"best_{objectives[0]}"] = best[0].values[0]
    return found


def write(study: Study, tracker: Tracker) -> None:
    """Writes all of it into the study's folder, shows it on the page of the sweep's run, and says where the best is."""
    folder, config = study.folder, study.config
    points = [_point(trial) for trial in study.trials]
    tables.write_csv(folder / TRIALS, [_row(trial, list(config.objectives)) for trial in study.trials])
    tracker.log_artifact(folder / TRIALS)
    best = study.best
    if not best:
        print("no trial is complete: there is no best one", flush=True)
        return
    shares = _importance(study)
    for path in _pictures(study, points, shares):
        tracker.log_artifact(path, "plots")
    _page(study, shares, folder / PAGE)
    tracker.log_artifact(folder / PAGE)
    for trial in best:
        target = folder / BEST if trial.number == best[0].number else folder / "front" / f"{trial.number}.yaml"
        target.parent.mkdir(exist_ok=True)
        target.write_text(_best(study, trial))
        tracker.log_artifact(target, "front" if target.parent != folder else None)
    path = (folder / BEST).relative_to(ROOT)
    tracker.set_tags(
        {f"best.{key}": _text(value) for key, value in best[0].params.items()}
        | {f"best.{name}": f"{value:.6g}" for name, value in zip(config.objectives, best[0].values, strict=True)}
        | {"best.trial": str(best[0].number), "mlflow.note.content": _note(study, best[0])}
    )
    said = ", ".join(f"{name} {value:.5g}" for name, value in zip(config.objectives, best[0].values, strict=True))
    print(f"best: trial {best[0].number}, {said}", flush=True)
    print(f"  {_training(config, path)}", flush=True)
    print(f"  python -m src.adopt {config.name} {path}     # into params.yaml, for dvc repro", flush=True)


def _pictures(study: Study, points: Sequence[Point], shares: dict[str, float]) -> list[Path]:
    config, folder = study.config, study.folder / "plots"
    folder.mkdir(exist_ok=True)
    objective, mode = next(iter(config.objectives.items()))
    given: dict[str, Any] = {"label": f"{config.study} · {config.sweep.sampler}", "sample": config.sample}
    logarithmic = [name for name, parameter in config.sweep.space.items() if parameter.log]
    drawn = [folder / "history.png", folder / "parallel.png"]
    sweeps.history(points, drawn[0], objective=objective, mode=mode, **given)
    sweeps.parallel(points, drawn[1], logarithmic=logarithmic, objective=objective, mode=mode, **given)
    if shares:
        drawn.append(folder / "importance.png")
        sweeps.importance(shares, drawn[-1], objective=objective, **given)
    if len(config.objectives) > 1:
        drawn.append(folder / "pareto.png")
        front = [trial.number for trial in study.best]
        sweeps.pareto(points, front, drawn[-1], objectives=list(config.objectives), **given)
    return drawn


def _importance(study: Study) -> dict[str, float]:
    """By how much each parameter sets the best trials apart from all (PED-ANOVA, Watanabe et al., 2023); sums to 1.

    Of several objectives the best are those nearest the front. Nothing where too little is known.
    """
    whole = study.optuna.get_trials(states=(TrialState.COMPLETE,))
    if len({tuple(trial.values) for trial in whole}) < ENOUGH:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some regimes for parameter")  # a condition that few trials met
        return optuna.importance.get_param_importances(study.optuna, evaluator=evaluator)


def _page(study: Study, shares: dict[str, float], path: Path) -> None:
    """One page with Optuna's interactive plots, readable without a network."""
    from optuna import visualization as show
    from plotly import graph_objects

    names = list(study.config.objectives)

    def first(trial: FrozenTrial) -> float:
        return float(trial.values[0])

    single: dict[str, Any] = {} if len(names) == 1 else {"target": first}
    named = single | {"target_name": names[0]}
    figures = [show.plot_optimization_history(study.optuna, **named)]
    if shares:
        bars = graph_objects.Bar(x=[*shares.values()][::-1], y=[*shares][::-1], orientation="h")
        figures.append(graph_objects.Figure(bars, {"title": {"text": f"What {names[0]} depends on (PED-ANOVA)"}}))
    figures.append(show.plot_parallel_coordinate(study.optuna, **named))
    if len(names) > 1:
        figures.append(show.plot_pareto_front(study.optuna, target_names=names))
    elif any(len(trial.intermediate_values) > 1 for trial in study.trials):
        figures.append(show.plot_intermediate_values(study.optuna))
    shown = [figure.to_html(full_html=False, include_plotlyjs=i == 0) for i, figure in enumerate(figures)]
    note = " · sample data, not a benchmark" if study.config.sample else ""
    path.write_text(
        f'<!doctype html>\n<meta charset="utf-8">\n<title>{study.config.study}</title>\n'
        f'<h1 style="font: bold 20px sans-serif">{study.config.study}{note}</h1>\n' + "\n".join(shown) + "\n"
    )


def _best(study: Study, trial: FrozenTrial) -> str:
    """A trial as overrides, nested as params.yaml has them."""
    config = study.config
    values = ", ".join(f"{name} {v:.6g}" for name, v in zip(config.objectives, trial.values, strict=True))
    head = [
        f"Trial {trial.number} of {len(study.trials)} of the study {config.study}: {values}.",
        f"Found by: python -m src.sweep {shlex.join(study.given)}",
        f"Train it: {_training(config, 'PATH_OF_THIS_FILE')}",
        f"Make it the result: python -m src.adopt {config.name} PATH_OF_THIS_FILE; dvc repro",
        f"(which puts these lines under experiments.{config.name}.overrides in params.yaml)",
    ]
    content = nested(_fixed(study.given) | trial.user_attrs[OVERRIDES])
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _training(config: SweepConfig, best: str | Path) -> str:
    """The command that trains a trial again."""
    profile = "" if config.sample else f" profile={config.profile.name}"
    return f"python -m src.train +experiment={config.name}{profile} +best={best}"


def _fixed(given: Sequence[str]) -> dict[str, Any]:
    """What the overrides that all trials share set, by dotted key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(as_assignments(list(given))):
        key = override.key_or_group
        if not override.is_delete() and key not in CIRCUMSTANCES and not key.startswith("hydra"):
            found = {k: v for k, v in found.items() if not k.startswith(f"{key}.")} | {key: override.value()}
    return found


def _note(study: Study, best: FrozenTrial) -> str:
    config = study.config
    rows = [{"parameter": key, "best": _text(value)} for key, value in best.params.items()]
    values = ", ".join(f"{name} **{v:.5g}**" for name, v in zip(config.objectives, best.values, strict=True))
    states = [_point(trial).state for trial in study.trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "fail"))
    return (
        f"Sweep of {config.name} ({config.profile.note}): {counted}. Best is trial {best.number}: {values}.\n\n"
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


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(key: str) -> str:
    """The last words of a key; as many as tell `rest.lr` from `lr`."""
    return key.removeprefix("model.").removeprefix("data.").removeprefix("loader.").removeprefix("optimizer.")
