"""A study in this process, without a training: what becomes of trials that fail, and what is measured after them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.common.errors import Failure
from src.configuration.composing import check, compose, compose_unchecked
from src.data import packed
from src.sweeping import report, study, trial
from src.sweeping.space import LATENCY, SweepConfig
from src.sweeping.study import Study
from tests.tiny_data import noise_digits

EXPERIMENT = "experiment=mnist_mlp"

Open = Callable[..., Study]


@pytest.fixture
def open_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens a study with further overrides of `sweep`; the second time, the same study."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def open_study(*overrides: str) -> Study:
        words = [EXPERIMENT, "sweep=mnist_mlp", "output=.", "sweep.sampler=random", *overrides]
        config: SweepConfig = check(compose_unchecked(words), SweepConfig)
        folder = tmp_path / "study"
        folder.mkdir(exist_ok=True)
        return Study(config, [EXPERIMENT], folder)

    return open_study


def test_a_trial_whose_worker_dies_is_requeued_as_often_as_retries_say(open_study: Open) -> None:
    opened = open_study("sweep.retries=2", "sweep.trials=1")
    for _ in range(2):
        planned = opened.next_trial()
        assert planned
        assert planned.number == 0
        assert opened.requeue(0, "SIGKILL")
    assert opened.next_trial()
    assert not opened.requeue(0, "SIGKILL")
    assert opened.next_trial() is None
    (failed,) = opened.trials
    assert failed.user_attrs[study.REASON] == "its process died 3 times (SIGKILL)"


def test_two_parameters_of_one_range_get_draws_of_their_own(open_study: Open) -> None:
    space = "sweep.space={model.optimizer.beta1: {float: [0.1, 0.9]}, model.network.dropout: {float: [0.1, 0.9]}}"
    opened = open_study(space, "sweep.trials=5")
    while opened.next_trial():
        pass
    draws = [list(trial.params.values()) for trial in opened.optuna.trials]
    assert len({value for draw in draws for value in draw}) == 10


def test_a_budget_is_of_all_trials_and_of_the_points_of_a_grid(open_study: Open) -> None:
    opened = open_study("sweep.trials=3")
    for number in range(3):
        assert opened.has_trials_to_start
        assert opened.next_trial()
        opened.fail(number, "NaN")
    assert opened.next_trial() is None
    assert not opened.has_trials_to_start
    again = open_study("sweep.trials=4")
    assert again.next_trial()
    assert again.next_trial() is None


def test_no_trial_starts_after_the_minutes_of_all_sessions(open_study: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("src.sweeping.study.time.monotonic", lambda: clock[0])
    opened = open_study("sweep.trials=null", "sweep.minutes=2")
    assert opened.next_trial()
    clock[0] += 100
    opened.end(0, [0.5], pruned=False, seconds=100.0)
    assert opened.next_trial()
    opened.fail(1, "NaN")
    resumed = open_study("sweep.trials=null", "sweep.minutes=2")
    clock[0] += 19
    assert resumed.next_trial()
    clock[0] += 2
    assert resumed.next_trial() is None


@pytest.mark.parametrize(("direction", "best"), [("max", 1), ("min", 0)])
def test_the_best_trial_is_that_of_the_objective_s_direction(direction: str, best: int, open_study: Open) -> None:
    opened = open_study("sweep.trials=2", f"sweep.objectives={{val_accuracy: {direction}}}")
    for number, value in enumerate((0.25, 0.75)):
        assert opened.next_trial()
        opened.end(number, [value], pruned=False, seconds=1.0)
    assert [trial.number for trial in opened.best] == [best]


def test_a_trial_below_the_median_of_the_others_is_pruned(open_study: Open) -> None:
    opened = open_study("sweep.trials=8")
    for number in range(6):
        assert opened.next_trial()
        assert not any(opened.report(number, epoch, 0.9) for epoch in (1, 2, 3))
        opened.end(number, [0.9], pruned=False, seconds=1.0)
    assert opened.next_trial()
    assert not opened.report(6, 1, 0.1)  # the first validation predicts little
    assert opened.report(6, 2, 0.1)
    opened.end(6, [], pruned=True, seconds=1.0)
    assert opened.next_trial()
    assert not any(opened.report(7, epoch, 0.95) for epoch in (1, 2, 3))


def test_the_reasons_are_counted_where_all_trials_failed(open_study: Open) -> None:
    opened = open_study("sweep.trials=6")
    for reason in ("no memory", "NaN", "no memory", "a", "b", "c"):
        planned = opened.next_trial()
        assert planned
        opened.fail(planned.number, reason)
    with pytest.raises(Failure, match=r"^all 6 trials failed: 2 x no memory; 1 x NaN; 1 x a; 2 x other reasons \(logs"):
        report.refuse_total_failure(opened)


def test_a_study_with_one_trial_that_ended_well_has_not_failed(open_study: Open) -> None:
    opened = open_study("sweep.trials=2")
    for _ in range(2):
        assert opened.next_trial()
    opened.fail(0, "NaN")
    opened.end(1, [0.5], pruned=False, seconds=1.0)
    report.refuse_total_failure(opened)


@pytest.mark.parametrize("experiment", ["mnist_mlp", "mnist_gan", "mnist_autoencoder"])
def test_latency_is_measured_on_the_inputs_that_the_task_exports(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LATENCY_SECONDS", 0.0)
    noise_digits(tmp_path)
    config = compose([f"experiment={experiment}", "output=out", f"data_folder={tmp_path}"])
    model = config.model(packed.read_meta(config.processed))
    shapes: list[tuple[int, ...]] = []
    answer = model.answer

    def recorded(*inputs: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(inputs[0].shape))
        assert torch.get_num_threads() == 1
        assert not model.training
        return answer(*inputs)

    monkeypatch.setattr(model, "answer", recorded)
    measured = trial._measure([LATENCY], model, config)
    assert measured.keys() == {LATENCY}
    assert measured[LATENCY] > 0
    assert set(shapes) == {(1, 64) if experiment == "mnist_gan" else (1, 1, 28, 28)}
