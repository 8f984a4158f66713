"""The search space: refusals, configurations from suggestions, and suggestions that a kill does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from src.common.errors import ConfigError
from src.common.paths import CONF
from src.configuration.composing import check, compose, compose_unchecked, overrides_of
from src.sweeping import refusals, samplers, space
from src.sweeping.optuna_internals import running_trial
from src.sweeping.space import SweepConfig

IMDB = ["experiment=imdb_lstm"]
CONDITIONAL = (
    "{model.optimizer: {choice: {adamw: {name: adamw, lr: 0.003}, sgd: {name: sgd, lr: 0.1}}}, "
    "model.optimizer.lr@adamw: {float: [0.001, 0.01], log: true, when: {model.optimizer: adamw}}, "
    "model.optimizer.lr@sgd: {float: [0.05, 0.5], log: true, when: {model.optimizer: sgd}}, "
    "model.hidden: {int: [8, 32], step: 8}}"
)


def sweep_of(*overrides: str) -> SweepConfig:
    return check(compose_unchecked([*IMDB, "sweep=imdb_lstm", "output=.", *overrides]), SweepConfig)


def test_every_experiment_has_a_search() -> None:
    assert {path.stem for path in (CONF / "experiment").glob("*")} == {path.stem for path in (CONF / "sweep").glob("*")}


@pytest.mark.parametrize("path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", ["sample", "full"])
def test_every_sweep_s_values_are_allowed_in_its_experiment(path: Path, profile: str) -> None:
    shared = [f"experiment={path.stem}", f"profile={profile}"]
    refusals.refuse(check(compose_unchecked([*shared, f"sweep={path.stem}", "output=."]), SweepConfig), shared)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.sampler=tpee", "sweep.sampler: 'tpee' is unknown; allowed: cmaes, gp, grid, random, tpe. Did you mean"),
        ("sweep.trails=3", "sweep.trails: unknown key; allowed: .*minutes, .* Did you mean 'trials'"),
        (
            "sweep.space={model.hidden: {int: [8, 16], lgo: true}}",
            "sweep.space.model.hidden.lgo: unknown key; .* 'log'",
        ),
        ("sweep.space={model.hidden: {int: [8, 16], choice: [8]}}", "exactly one of float, int and choice"),
        ("sweep.space={model.hidden: {int: [16, 8]}}", "the lower bound 16 is above the upper one 8"),
        ("sweep.space={model.dropout: {float: [0, 0.5], log: true}}", "starts above zero, not at 0"),
        ("sweep.space={model.hiden: {int: [8, 16]}}", "space.model.hiden: at 8: model.hiden: unknown key; .* 'hidden'"),
        ("sweep.space={model.dropout: {float: [0, 1.5]}}", "space.model.dropout: at 1.5: model.dropout: 1.5 is not"),
        (
            "sweep.space={model.pooling: {choice: [max, maen]}}",
            "at 'maen': .* Did you mean 'mean'",
        ),
        ("sweep.space={model.hidden: {float: [8, 16.5]}}", "model.hidden: 16.5 is not allowed"),
        (
            "sweep.space={model.dropout: {float: [0, 0.5], when: {model.pooling: max}}}",
            "when: 'model.pooling' is no earlier parameter",
        ),
        ("sweep.sampler=grid", "sweep.space.model.optimizer.lr: a grid needs steps"),
        ("sweep.objectives={test_accuracy: max}", "test_accuracy: is no objective"),
        ("sweep.objectives={val_accuracy: max, parameters: min}", "set sweep.pruner=none"),
        ("sweep.trials=null", "a sweep needs a budget"),
        ("sweep.ray={processes: 2}", "sweep.ray: its processes share a study; set sweep.storage"),
        ("trainer.num_nodes=2", "trainer.num_nodes: the processes of a trial are on one node"),
    ],
)
def test_an_impossible_search_is_refused_and_named_before_anything_starts(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refusals.refuse(sweep_of(override), IMDB)


@pytest.mark.parametrize(("optimizer", "low", "high"), [("adamw", 0.001, 0.01), ("sgd", 0.05, 0.5)])
def test_a_conditional_parameter_is_suggested_where_its_condition_holds(
    optimizer: str, low: float, high: float
) -> None:
    config = sweep_of(f"sweep.space={CONDITIONAL}")
    refusals.refuse(config, IMDB)
    study = optuna.create_study()
    study.enqueue_trial({"model.optimizer": optimizer})
    suggested = space.suggest(config.sweep.space, study.ask())
    assert list(suggested) == ["model.optimizer", f"model.optimizer.lr@{optimizer}", "model.hidden"]
    model: Any = space.trial_config(config.sweep.space, suggested, IMDB).model
    assert model.optimizer.name == optimizer
    assert low <= model.optimizer.lr <= high
    assert model.optimizer.lr == suggested[f"model.optimizer.lr@{optimizer}"]


def test_nested_values_as_params_yaml_has_them_say_the_same_as_the_overrides() -> None:
    config = sweep_of(f"sweep.space={CONDITIONAL}")
    suggested = {"model.optimizer": "sgd", "model.optimizer.lr@sgd": 0.07, "model.hidden": 16}
    tree = space.nested(space.assignments(config.sweep.space, suggested))
    assert tree == {"model": {"optimizer": {"name": "sgd", "lr": 0.07}, "hidden": 16}}
    direct = space.trial_config(config.sweep.space, suggested, IMDB)
    assert compose([*IMDB, *overrides_of(tree), "output=."]).plain() == direct.plain()
    assert config.sweep.space["model.optimizer"].value("sgd") == {"name": "sgd", "lr": 0.1}  # unchanged


def test_a_trial_s_configuration_is_what_hydra_composes_of_the_same_overrides() -> None:
    searched = {
        "model": space.Parameter.model_validate({"choice": ["fast_resnet", "resnet18"]}),
        "model.optimizer.lr": space.Parameter.model_validate({"float": [0.1, 0.2]}),
        "data.loader.low_resolution": space.Parameter.model_validate(
            {"choice": {"none": None, "small": {"size": 16, "until": 0.5}}}
        ),
        "seed": space.Parameter.model_validate({"int": [0, 3]}),
    }
    shared = ["experiment=cifar10_resnet", "model.label_smoothing=0.05"]
    for low, value in (("none", "null"), ("small", "{size: 16, until: 0.5}")):
        suggested = {"model": "resnet18", "model.optimizer.lr": 0.15, "data.loader.low_resolution": low, "seed": 2}
        overrides = ["model=resnet18", "model.optimizer.lr=0.15", f"data.loader.low_resolution={value}", "seed=2"]
        composed = compose([*shared, *overrides, "output=x"])
        assert space.trial_config(searched, suggested, shared, "x").plain() == composed.plain()


def test_a_key_below_a_group_s_choice_keeps_its_dots() -> None:
    tree = space.nested({"model": "resnet18", "model.optimizer.lr": 0.2, "seed": 1})
    assert tree == {"model": "resnet18", "model.optimizer.lr": 0.2, "seed": 1}
    config = compose(["experiment=cifar10_resnet", *overrides_of(tree), "output=."])
    assert config.plain()["model"]["network"]["_target_"].endswith("resnet18")
    assert config.plain()["model"]["optimizer"]["lr"] == 0.2


SPACE = {
    "x": space.Parameter.model_validate({"float": [0.0, 1.0], "step": 0.125}),
    "n": space.Parameter.model_validate({"int": [1, 5]}),
    "c": space.Parameter.model_validate({"choice": ["a", "b"]}),
}


def suggestions(config: SweepConfig, path: Path, *, killed_at: dict[int, int], trials: int = 14) -> list[Any]:
    """The suggestions of a study with an artificial objective.

    `killed_at`: trial -> number of suggestions after which its process is killed, and another opens the stored study.
    """

    def study() -> optuna.Study:
        return optuna.create_study(
            storage=f"sqlite:///{path}", study_name="s", sampler=samplers.sampler(config), load_if_exists=True
        )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    current, results = study(), []
    for number in range(trials):
        trial = current.ask()
        if number in killed_at:
            for name in list(SPACE)[: killed_at[number]]:
                SPACE[name].suggest(trial, name)
            current = study()
            (unfinished,) = current.get_trials(states=(optuna.trial.TrialState.RUNNING,))
            trial = running_trial(current, unfinished)
        suggested = space.suggest(SPACE, trial)
        current.tell(
            trial, (float(suggested["x"] or 0) - 0.3) ** 2 + int(suggested["n"] or 0) + (suggested["c"] == "a")
        )
        results.append(suggested)
    return results


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp", "cmaes"])
def test_a_study_that_was_killed_anywhere_suggests_what_it_would_have_suggested(sampler: str, tmp_path: Path) -> None:
    config = sweep_of(f"sweep.sampler={sampler}", "sweep.seed=3")
    config = config.model_copy(update={"sweep": config.sweep.model_copy(update={"space": SPACE})})
    expected = suggestions(config, tmp_path / "expected.db", killed_at={})
    assert suggestions(config, tmp_path / "killed.db", killed_at={3: 0, 11: 1, 12: 3}) == expected
    other = config.model_copy(update={"sweep": config.sweep.model_copy(update={"seed": 4})})
    assert suggestions(other, tmp_path / "other.db", killed_at={}) != expected
    assert len({repr(suggested) for suggested in expected}) > 7  # not the same suggestion again and again
