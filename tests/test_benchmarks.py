"""The benchmarks' own machinery, and every benchmark end to end at a size that measures nothing."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import inference, machine, memory, pipeline, training
from benchmarks.__main__ import main
from benchmarks.setting import EXAMPLES, EXPERIMENTS, Setting
from benchmarks.table import Figure, as_json, as_markdown, at_least, at_most, print_table
from benchmarks.timing import Spread, StepClock, paired, per_call
from src.common.errors import Failure
from src.data import packed
from tests.tiny_data import cifar_members, write_tar

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


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What a training fixes for its whole process is undone for the tests that follow."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)


def tiny(folder: Path, experiment: str) -> Setting:
    overrides = ("profile=sample", "trainer.threads=1", *TINY[experiment])
    return Setting(folder, (experiment,), overrides, rounds=1, seconds=0.01)


def sleeping(seconds: float, said: list[str], name: str) -> Callable[[], float]:
    def measure() -> float:
        said.append(name)
        return per_call(lambda: time.sleep(seconds), 0.0)()

    return measure


def test_candidates_take_turns_and_the_second_round_begins_with_the_last() -> None:
    said: list[str] = []
    paired({name: sleeping(0, said, name) for name in "ab"}, rounds=3)
    assert said == list("abbaab")


def test_the_ratio_of_known_sleeps_is_theirs() -> None:
    said: list[str] = []
    rounds = paired({"slow": sleeping(0.06, said, "slow"), "quick": sleeping(0.02, said, "quick")}, rounds=3)
    ratio = rounds.ratio("slow", "quick")
    assert ratio.median == pytest.approx(3, rel=0.3)
    assert ratio.low <= ratio.median <= ratio.high
    assert rounds.spread("slow", lambda seconds: 1 / seconds).median == pytest.approx(1 / 0.06, rel=0.3)


def test_ratios_are_taken_round_by_round_so_that_a_slow_machine_cancels_out() -> None:
    slowness = iter([1.0, 1.0, 10.0, 10.0, 1.0, 1.0])
    candidates = {"a": lambda: 2 * next(slowness), "b": lambda: next(slowness)}
    assert paired(candidates, rounds=3).ratio("a", "b") == Spread(2, 2, 2)


def test_a_step_s_time_leaves_out_the_first_step_and_what_comes_after_the_last() -> None:
    clock = StepClock(steps=3)
    time.sleep(0.2)
    clock.tick()
    for _ in range(2):
        time.sleep(0.03)
        clock.tick()
    time.sleep(0.2)
    assert clock.per_step == pytest.approx(0.03, rel=0.5)


def test_a_verdict_says_by_how_much_of_the_target_it_is_missed() -> None:
    assert at_most(1.05).verdict(1.05) == "met"
    assert at_most(2.0).verdict(2.5) == "missed by 25.0%"
    assert at_least(1.8).verdict(1.9) == "met"
    assert at_least(1.8).verdict(1.35) == "missed by 25.0%"


def test_a_figure_that_is_no_number_has_not_met_its_target() -> None:
    assert at_most(1.0).verdict(float("nan")).startswith("missed")


def test_the_table_shows_rounds_and_verdicts_in_each_form(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        Figure("training x", "overhead", Spread(1.1, 1.0, 1.2), "", at_most(1.0)),
        Figure.single("training x", "rate", 1234.5, "examples/s"),
    ]
    print_table(figures, {"gpu": "none"})
    printed = capsys.readouterr().out
    assert "missed by 10.0%" in printed
    assert "1.00 .. 1.20" in printed
    markdown = as_markdown(figures, {"gpu": "none"})
    assert markdown.startswith("* gpu: none\n")
    assert "| training x | overhead | 1.10 | 1.00 .. 1.20 | ≤ 1.00 | missed by 10.0% |" in markdown
    assert "| training x | rate | 1,234 examples/s |  |  |  |" in markdown
    assert json.loads(as_json(figures, {}))["figures"][1]["spread"]["median"] == 1234.5


def test_generated_data_has_the_official_sizes_and_lengths(tmp_path: Path) -> None:
    config = tiny(tmp_path, "imdb_lstm").prepare("imdb_lstm")
    split = packed.read_split(config.processed, "train")
    lengths = split["offsets"].diff()
    assert len(split["labels"]) == EXAMPLES["imdb"]["train"]
    assert 190 < lengths.median() < 210
    assert (int(lengths.min()), int(lengths.max())) == (10, 2500)
    assert int(split["tokens"].max()) < len(packed.read_meta(config.processed)["vocabulary"])


def test_given_archives_are_measured_instead_of_generated_data(tmp_path: Path) -> None:
    write_tar(tmp_path / "cifar-10-binary.tar.gz", cifar_members())
    config = Setting(tmp_path / "folder", archives=tmp_path).prepare("cifar10_resnet")
    meta = packed.read_meta(config.processed)
    assert meta["source"]["origin"] == "archive"
    assert sum(split["examples"] for split in meta["splits"].values()) == 46


def test_the_profile_is_full_unless_an_override_names_one(tmp_path: Path) -> None:
    assert Setting(tmp_path).compose("facades_pix2pix_128").profile.name == "full"
    assert tiny(tmp_path, "facades_pix2pix_128").compose("facades_pix2pix_128").profile.name == "sample"


def test_an_unknown_benchmark_is_refused_with_the_names_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "trainig"])
    assert main() == 2
    assert re.fullmatch(r"benchmarks: trainig unknown; allowed: machine, .*training.*\n", capsys.readouterr().err)


def test_a_process_s_peak_is_its_own() -> None:
    held = torch.zeros(2**27)  # half a gigabyte here, which a child's ru_maxrss would begin with
    peak = memory.peak_memory([sys.executable, "-c", "import time; b = bytes(1) * 2**26; time.sleep(0.2)"], {})
    assert held.numel() and 2**26 < peak < 2**28


def test_a_command_that_fails_is_named_with_what_it_said() -> None:
    with pytest.raises(Failure, match=r"-c .* failed: .*no such thing"):
        memory.peak_memory([sys.executable, "-c", "raise SystemExit('no such thing')"], {})


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_training_compares_the_three_loops(tmp_path: Path, experiment: str) -> None:
    figures = {figure.name: figure for figure in training.measure(tiny(tmp_path, experiment))}
    for name in ("trainer.fit", "hand-written loop", "stock code", "share of the matrix-product peak"):
        assert figures[name].spread.low > 0
    assert figures["time of trainer.fit / hand-written loop"].spread.median > 0.5
    assert 0 < figures["time for batches"].spread.median < 100


@pytest.mark.slow
def test_the_hand_written_loop_trains_as_the_trainer_does(tmp_path: Path) -> None:
    """The same work, not just the same time: without dropout's random numbers both end with the same weights."""
    for experiment, more in {"cifar10_resnet": (), "facades_pix2pix_128": ("model.dropout=0.0",)}.items():
        setting = tiny(tmp_path, experiment)
        setting = Setting(tmp_path, (experiment,), (*setting.overrides, "trainer.precision='32'", *more))
        found = []
        for loop in ("fit", "hand_written"):
            config = setting.prepare(experiment)
            torch.manual_seed(0)
            loops = training.Loops(config, tmp_path / loop)
            getattr(loops, loop)(4)
            found.append(loops.model.state_dict())
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, msg=f"{experiment}: {key} differs")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_inference_compares_batches_and_threads(tmp_path: Path, experiment: str) -> None:
    figures = inference.measure(tiny(tmp_path, experiment))
    aimed = [figure.benchmark for figure in figures if figure.target]
    assert all(figure.spread.low > 0 for figure in figures)
    assert all("batch 1," in name for name in aimed)
    assert bool(aimed) == (experiment != "imdb_lstm")


@pytest.mark.slow
def test_memory_runs_the_real_stage(tmp_path: Path) -> None:
    figures = memory.measure(tiny(tmp_path, "imdb_lstm"))
    assert figures[-1].target is memory.BEYOND_DATA
    assert 0.1 < figures[-1].spread.median < 10
    assert (tmp_path / "imdb_lstm" / "train" / "model.safetensors").is_file()


@pytest.mark.slow
def test_machine_and_start_up_are_measured(tmp_path: Path) -> None:
    figures = [*machine.measure(tiny(tmp_path, "imdb_lstm")), *pipeline.measure(tiny(tmp_path, "imdb_lstm"))]
    assert all(figure.spread.low > 0 for figure in figures)
    assert {"commit", "processor", "packages"} <= set(machine.description())
