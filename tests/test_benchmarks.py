"""The machinery of the benchmarks, and every benchmark end to end at a tiny size."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, image_folder, inference, machine, memory, pipeline, training
from benchmarks.__main__ import main
from benchmarks.setting import EXAMPLES, EXPERIMENTS, Setting
from benchmarks.table import Figure, at_least, at_most, print_table
from benchmarks.timing import Spread, StepClock, paired, per_call
from src.common.errors import Failure
from src.data import packed

TINY = {
    "cifar10_resnet": ("model.network.width=4", "data.loader.batch_size=8", "data.loader.eval_batch_size=8"),
    "imdb_lstm": (
        "model.hidden=4",
        "model.embedding=4",
        "data.vocabulary=50",
        "data.loader.batch_size=4",
        "data.loader.max_tokens=20",
    ),
    "facades_pix2pix_128": ("model.width=4", "data.size=32", "data.loader.batch_size=2"),
}


pytestmark = pytest.mark.usefixtures("restore_deterministic_mode")


def tiny(folder: Path, experiment: str) -> Setting:
    overrides = ("profile=sample", "trainer.threads=1", *TINY[experiment])
    return Setting(folder, (experiment,), overrides, rounds=1, seconds=0.01)


def sleeping(seconds: float, order: list[str], name: str) -> Callable[[], float]:
    def measure() -> float:
        order.append(name)
        return per_call(lambda: time.sleep(seconds), 0.0)()

    return measure


def test_candidates_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    paired({name: sleeping(0, order, name) for name in "ab"}, rounds=3)
    assert order == list("abbaab")


def test_the_ratio_of_two_sleeps_is_measured() -> None:
    rounds = paired({"slow": sleeping(0.06, [], "slow"), "quick": sleeping(0.02, [], "quick")}, rounds=3)
    ratio = rounds.ratio("slow", "quick")
    assert ratio.median == pytest.approx(3, rel=0.3)
    assert ratio.low <= ratio.median <= ratio.high
    assert rounds.spread("slow", lambda seconds: 1 / seconds).median == pytest.approx(1 / 0.06, rel=0.3)


def test_a_slow_round_does_not_change_the_ratio() -> None:
    slowness = iter([1.0, 1.0, 10.0, 10.0, 1.0, 1.0])
    candidates = {"a": lambda: 2 * next(slowness), "b": lambda: next(slowness)}
    assert paired(candidates, rounds=3).ratio("a", "b") == Spread(2, 2, 2)


def test_the_clock_excludes_the_first_step_and_the_end_of_the_loop() -> None:
    clock = StepClock(steps=3)
    time.sleep(0.2)
    clock.tick()
    for _ in range(2):
        time.sleep(0.03)
        clock.tick()
    time.sleep(0.2)
    assert clock.per_step == pytest.approx(0.03, rel=0.5)


def test_a_verdict_states_the_distance_to_the_target() -> None:
    assert at_most(1.05).verdict(1.05) == "met"
    assert at_most(2.0).verdict(2.5) == "missed by 25.0%"
    assert at_least(1.8).verdict(1.9) == "met"
    assert at_least(1.8).verdict(1.35) == "missed by 25.0%"


def test_nan_misses_every_target() -> None:
    assert at_most(1.0).verdict(float("nan")).startswith("missed")


def test_the_table_shows_the_range_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        Figure("training x", "overhead", Spread(1.1, 1.0, 1.2), "", at_most(1.0)),
        Figure.single("training x", "rate", 1234.5, "examples/s"),
    ]
    print_table(figures, {"gpu": "none"})
    printed = capsys.readouterr().out
    assert "missed by 10.0%" in printed
    assert "1.00 .. 1.20" in printed
    assert "1,234 examples/s" in printed
    assert "gpu          none" in printed


def test_generated_data_has_the_official_sizes_and_lengths(tmp_path: Path) -> None:
    config = tiny(tmp_path, "imdb_lstm").prepare("imdb_lstm")
    split = packed.read_split(config.processed, "train")
    lengths = split["offsets"].diff()
    assert len(split["labels"]) == EXAMPLES["imdb"]["train"]
    assert 190 < lengths.median() < 210
    assert (int(lengths.min()), int(lengths.max())) == (10, 2500)
    assert int(split["tokens"].max()) < len(packed.read_meta(config.processed)["vocabulary"])


def test_the_profile_is_full_unless_an_override_names_one(tmp_path: Path) -> None:
    assert Setting(tmp_path).compose("facades_pix2pix_128").profile.name == "full"
    assert tiny(tmp_path, "facades_pix2pix_128").compose("facades_pix2pix_128").profile.name == "sample"


def test_an_unknown_benchmark_is_refused_with_the_allowed_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "trainig"])
    assert main() == 2
    assert re.fullmatch(r"benchmarks: trainig unknown; allowed: machine, .*training.*\n", capsys.readouterr().err)


def test_the_peak_of_a_process_excludes_its_parent() -> None:
    ballast = torch.zeros(2**27)  # half a gigabyte, at which a child's ru_maxrss would start
    peak = memory.peak_memory([sys.executable, "-c", "import time; b = bytes(1) * 2**26; time.sleep(0.2)"], {})
    assert ballast.numel() and 2**26 < peak < 2**28


def test_a_failed_command_is_reported_with_its_output() -> None:
    with pytest.raises(Failure, match=r"-c .* failed: .*no such thing"):
        memory.peak_memory([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_training_compares_the_three_loops(tmp_path: Path, experiment: str) -> None:
    figures = {figure.name: figure for figure in training.measure(tiny(tmp_path, experiment))}
    for name in ("trainer.fit", "hand-written loop", "stock code", "share of the matrix-product peak"):
        assert figures[name].spread.low > 0
    assert figures["time of trainer.fit / hand-written loop"].spread.median > 0.5
    assert 0 < figures["time for batches"].spread.median < 100


@pytest.mark.slow
def test_the_hand_written_loop_trains_as_the_trainer_does(tmp_path: Path) -> None:
    """They do the same work: without dropout both end with the same weights."""
    for experiment, more in {"cifar10_resnet": (), "facades_pix2pix_128": ("model.dropout=0.0",)}.items():
        setting = tiny(tmp_path, experiment)
        setting = Setting(tmp_path, (experiment,), (*setting.overrides, "trainer.precision='32'", *more))
        states = []
        for loop in ("fit", "hand_written"):
            config = setting.prepare(experiment)
            torch.manual_seed(0)
            loops = training.Loops(config, tmp_path / loop)
            getattr(loops, loop)(4)
            states.append(loops.model.state_dict())
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, msg=f"{experiment}: {key} differs")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["imdb_lstm", "facades_pix2pix_128"])
def test_inference_compares_batches_and_threads(tmp_path: Path, experiment: str) -> None:
    figures = inference.measure(tiny(tmp_path, experiment))
    with_target = [figure.benchmark for figure in figures if figure.target]
    assert all(figure.spread.low > 0 for figure in figures)
    assert all("batch 1," in name for name in with_target)
    assert bool(with_target) == (experiment != "imdb_lstm")


@pytest.mark.slow
@pytest.mark.long
def test_photos_in_class_folders_train_packed_and_as_an_image_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "NETWORKS", {"small network": image_folder.NETWORKS["small network"]})
    setting = Setting(tmp_path, overrides=("trainer.threads=1",), rounds=1)
    figures = {figure.name: figure for figure in image_folder.measure_at(setting, size=32, count=32, batch=8)}
    assert figures.keys() == {"packing, once", "packed", "ImageFolder", "speed on packed photos / ImageFolder"}
    assert all(figure.spread.low > 0 for figure in figures.values())


@pytest.mark.slow
@pytest.mark.long
def test_memory_runs_the_real_stage(tmp_path: Path) -> None:
    figures = memory.measure(tiny(tmp_path, "imdb_lstm"))
    assert figures[-1].target is memory.BEYOND_DATA
    assert 0.1 < figures[-1].spread.median < 10
    assert (tmp_path / "imdb_lstm" / "train" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_machine_and_start_up_are_measured(tmp_path: Path) -> None:
    figures = [*machine.measure(tiny(tmp_path, "imdb_lstm")), *pipeline.measure(tiny(tmp_path, "imdb_lstm"))]
    assert all(figure.spread.low > 0 for figure in figures)
    assert {"commit", "processor", "packages"} <= set(machine.description())


# --- one GPU, tried on the CPU ----------------------------------------------------------------------------------------

ON_CPU = ("trainer=cpu", "trainer.threads=1", "data.loader.batch_size=50", "model.network.width=4")


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_trains_and_evaluates_with_the_views_of_its_recipe(tmp_path: Path) -> None:
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1")
    setting = Setting(tmp_path, overrides=(*ON_CPU, *short), rounds=1)
    seconds, *accuracies = gpu.classification(setting, gpu.EXPERIMENT, target=at_least(94))
    assert (seconds.name, seconds.unit) == ("training, 1 epochs", "s")
    assert [figure.name for figure in accuracies] == ["accuracy, six_views", "accuracy"]
    assert [figure.target is None for figure in accuracies] == [False, True]
    assert all(0 <= figure.spread.median <= 100 for figure in accuracies)


@pytest.mark.long
def test_the_benchmark_of_a_gpu_compares_the_bits_of_repeated_and_resumed_trainings(tmp_path: Path) -> None:
    figures = gpu.bits(Setting(tmp_path, overrides=ON_CPU, rounds=1))
    assert [figure.spread.median for figure in figures] == [1, 1]


def test_a_part_that_takes_too_long_or_fails_is_ended_and_named() -> None:
    with pytest.raises(Failure, match="ended after 1 s"):
        gpu.in_process(time.sleep, 60, limit_s=1)
    with pytest.raises(Failure, match="ValueError"):
        gpu.in_process(int, "no number", limit_s=60)


def test_an_archive_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"no cifar-10-binary\.tar\.gz in it"):
        Setting(tmp_path, archives=tmp_path).real(gpu.EXPERIMENT)
