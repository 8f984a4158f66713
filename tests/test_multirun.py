"""`-m`: all runs are checked before the first starts, a failed one does not end the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins

from src.common.errors import ConfigError, Failure
from src.common.paths import ROOT
from src.configuration.command import main
from src.configuration.schema import Config

Multirun = Callable[..., int]


@pytest.fixture
def trained() -> list[Config]:
    """The configurations that a command trained; seed 13 fails, and seed 14 with an error that nothing expected."""
    return []


@pytest.fixture
def multirun(trained: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Multirun]:
    """`python -m src.train -m` without the training; returns the exit code."""
    # What the command replaces in Hydra, for its process.
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", ConfigLoaderImpl.load_configuration)
    monkeypatch.setattr(Plugins, "instantiate_sweeper", Plugins.instantiate_sweeper)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def train(config: Config) -> None:
        trained.append(config)
        if config.seed == 13:
            raise Failure("the loss became NaN")
        if config.seed == 14:
            raise RuntimeError("shapes differ")

    def refuse(config: Config) -> None:
        if config.trainer.accelerator == "gpu":
            raise ConfigError("trainer.accelerator: no GPU here")

    def run(*words: str) -> int:
        folder = f"hydra.sweep.dir={tmp_path}/${{name}}"
        monkeypatch.setattr("sys.argv", ["train", "-m", *words, *([] if "hydra." in " ".join(words) else [folder])])
        try:
            main(train, refuse=refuse)()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("experiments", ["mnist_mlp,mnist_cnn", "glob([mnist_ml*,mnist_cn*])"])
def test_each_run_has_a_folder_below_its_own_experiment(
    experiments: str, multirun: Multirun, trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert multirun(f"+experiment={experiments}", "seed=range(0,2)") == 0
    assert {(config.name, config.seed) for config in trained} == {
        (name, seed) for name in ("mnist_mlp", "mnist_cnn") for seed in (0, 1)
    }
    assert all(config.folder.parent.resolve() == tmp_path / config.name for config in trained)
    assert len({config.output for config in trained}) == 4
    output = capsys.readouterr().out
    assert "4 of 4 runs are done" in output
    names = re.findall(r"src.compare (\S+) (\S+)$", output, re.MULTILINE)
    assert {(ROOT / name).resolve() for name in names[0]} == {tmp_path / "mnist_mlp", tmp_path / "mnist_cnn"}


def test_the_runs_of_one_command_share_a_folder_in_experiments(multirun: Multirun, trained: list[Config]) -> None:
    assert multirun("+experiment=mnist_mlp", "seed=0,1", "hydra.output_subdir=null") == 0
    folders = [config.folder for config in trained]
    for folder in folders:
        folder.rmdir()
    parent = folders[0].parent
    parent.rmdir()
    assert folders == [parent / "0", parent / "1"]
    assert parent.parent == ROOT / "experiments" / "runs" / "mnist_mlp"


def test_a_failed_run_does_not_end_the_others(
    multirun: Multirun, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    assert multirun("+experiment=mnist_mlp", "seed=13,14,1") == 1
    assert [config.seed for config in trained] == [13, 14, 1]
    printed = capsys.readouterr()
    assert "1 of 3 runs are done" in printed.out
    assert re.search(r"^  seed=13 +failed: the loss became NaN$", printed.out, re.MULTILINE)
    assert re.search(r"^  seed=14 +failed: RuntimeError: shapes differ$", printed.out, re.MULTILINE)
    assert "Traceback" in printed.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["+experiment=imdb_lstm", "model.pooling=max,wrong,mean"], "model.pooling: 'wrong' is unknown"),
        (["+experiment=mnist_mlp,mnist_cn"], "experiment=mnist_cn: unknown"),
        (["+experiment=mnist_mlp", "trainer=cpu,gpu"], "trainer.accelerator: no GPU here"),
        (["+experiment=glob(mnst_*)"], "experiment=glob(mnst_*): names no values to run"),
        (["+experiment=mnist_mlp", "seed=0,1", "output=x"], "x: two runs would write there (seed=0; seed=1)"),
        (["+experiment=mnist_mlp", "seed=0,1", "hydra.run.dir=x"], "hydra.run.dir: is the folder of a single run"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_the_first_starts(
    words: list[str],
    line: str,
    multirun: Multirun,
    trained: list[Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert multirun(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"configuration refused: {line}")
    assert len(error.splitlines()) == 1
    assert (trained, list(tmp_path.iterdir())) == ([], [])


def test_a_comma_separates_paths(multirun: Multirun, trained: list[Config]) -> None:
    assert multirun("+experiment=mnist_mlp", "data.archive=a (1).tar,b=ü.tar") == 0
    assert [config.data.archive for config in trained] == ["a (1).tar", "b=ü.tar"]


def test_a_section_among_the_alternatives_replaces_the_experiment_s(multirun: Multirun, trained: list[Config]) -> None:
    optimizers = "model.optimizer={name: sgd, lr: 0.1},{name: adam, lr: 0.01}"
    assert multirun("+experiment=mnist_mlp", optimizers) == 0
    assert [config.plain()["model"]["optimizer"]["name"] for config in trained] == ["sgd", "adam"]
