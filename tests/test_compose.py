"""params.yaml: its overrides, and the resolved files that DVC's stages read."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import compose as stage
from src.common.errors import ConfigError
from src.common.paths import ROOT
from src.compose import compose_data, compose_experiment
from src.configuration import params as params_file
from src.configuration.composing import compose, overrides_of

PARAMS: dict[str, Any] = {
    "profile": "sample",
    "trainer": "cpu",
    "data": {"cifar10": {"archive": "default"}, "imdb": {}, "facades": {"size": "default"}},
    "run": {"cifar10_resnet": "cifar10", "imdb_lstm": "imdb", "facades_pix2pix": "facades"},
    "experiments": {
        "cifar10_resnet": {"overrides": {"seed": 0, "model": {"optimizer": {"lr": "default"}}}},
        "imdb_lstm": {"overrides": {"seed": 0}},
    },
}


def params(name: str = "cifar10_resnet", **changes: Any) -> dict[str, Any]:
    """PARAMS with changes: `overrides` of one experiment, or top-level keys."""
    changed = copy.deepcopy(PARAMS)
    if "overrides" in changes:
        changed["experiments"][name]["overrides"] = changes.pop("overrides")
    return changed | changes


def refusal(name: str, changed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        compose_experiment(changed, name)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- overrides --------------------------------------------------------------------------------------------------------


def test_nested_values_become_dotted_assignments() -> None:
    values = {
        "seed": 0,
        "model": {"optimizer": {"lr": 0.5, "nesterov": False}, "dropout": 1e-5},
        "milestones": [0.5, 1],
    }
    assert list(overrides_of(values)) == [
        "seed=0",
        "model.optimizer.lr=0.5",
        "model.optimizer.nesterov=false",
        "model.dropout=1e-05",
        "milestones=[0.5,1]",
    ]


def test_a_null_stays_a_null_and_default_is_left_out() -> None:
    assert list(overrides_of({"a": None, "b": "default", "c": {"d": "default"}, "e": {}}, "data.")) == ["data.a=null"]


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "null",
        "true",
        "7",
        "1e-3",
        "",
        "[1]",
        "{a: b}",
        "x,y",
        "~/data",
        "a=b",
        "don't",
        'say "so"',
        "C:\\new",
        "end\\",
        "Größe — π",
    ],
)
def test_a_string_is_passed_on_unchanged(text: str) -> None:
    (override,) = overrides_of({"description": text})
    assert compose(["experiment=imdb_lstm", "output=out", override]).description == text


def test_strings_in_lists_are_passed_on_unchanged() -> None:
    urls = ["https://a.example/x?y=1,2", "null", "Größe"]
    (override,) = overrides_of({"data": {"official": {"urls": urls}}})
    official = compose(["experiment=imdb_lstm", "output=out", override]).data.official
    assert official is not None
    assert official.urls == urls


# --- experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMS["experiments"])
def test_default_stands_for_the_value_in_conf(name: str) -> None:
    untouched = compose([f"experiment={name}", f"output=experiments/{name}"])
    assert compose_experiment(PARAMS, name).plain() == untouched.plain()


def test_overrides_profile_and_trainer_reach_the_experiment() -> None:
    overrides = {"seed": 7, "trainer": {"max_epochs": 3, "gradient_clip": None}, "model": {"optimizer": {"lr": 0.5}}}
    config = compose_experiment(params(overrides=overrides, profile="full", trainer="gpu"), "cifar10_resnet")
    assert (config.seed, config.profile.name) == (7, "full")
    assert (config.trainer.max_epochs, config.trainer.accelerator) == (3, "gpu")
    assert config.plain()["model"]["optimizer"]["lr"] == 0.5


def test_settings_of_shared_data_reach_the_experiment_and_the_data() -> None:
    changed = params()
    changed["data"]["cifar10"] = {"val_fraction": 0.2, "archive": "~/été/cifar.tar"}
    config, data = compose_experiment(changed, "cifar10_resnet"), compose_data(changed, "cifar10")
    assert config.packing == data.packing
    assert (data.packing["val_fraction"], data.data.archive) == (0.2, "~/été/cifar.tar")


def test_an_experiment_cannot_pack_shared_data_differently() -> None:
    message = refusal("cifar10_resnet", params(overrides={"data": {"val_fraction": 0.2}}))
    assert message.startswith("experiments.cifar10_resnet: data.val_fraction is 0.2, but data/processed is shared")
    assert "packed with 0.1; set it under data.cifar10 in params.yaml" in message


def test_an_experiment_may_batch_shared_data_differently() -> None:
    config = compose_experiment(params(overrides={"data": {"loader": {"batch_size": 7}}}), "cifar10_resnet")
    assert config.loader.batch_size == 7


def test_a_missing_data_set_is_refused_with_the_line_to_add() -> None:
    message = refusal("cifar10_resnet", params(data={"imdb": {}}))
    assert message == "data.cifar10: not in params.yaml, but cifar10_resnet needs it; add the line `cifar10: {}`"


def test_an_unused_data_set_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.mnist: no experiment that params\.yaml runs uses it; remove the line$"
    ):
        compose_data(params(data=PARAMS["data"] | {"mnist": {}}), "mnist")


def test_a_wrong_data_set_of_an_experiment_is_refused() -> None:
    message = refusal("cifar10_resnet", params(run=PARAMS["run"] | {"cifar10_resnet": "imdb"}))
    assert message == "run.cifar10_resnet: is 'imdb', but cifar10 is used; write 'cifar10' there"


def test_a_mistyped_override_is_refused_with_its_path() -> None:
    message = refusal("cifar10_resnet", params(overrides={"model": {"optimizer": {"lrr": 1}}}))
    assert message.startswith("model.optimizer.lrr: unknown key")


CLASSIC = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} - {"facades_pix2pix_128"}


@pytest.mark.parametrize("name", sorted(CLASSIC))
def test_every_experiment_runs_under_dvc_with_two_lines_in_params(name: str) -> None:
    real = yaml.safe_load((ROOT / "params.yaml").read_text())
    data = compose([f"experiment={name}", "output=."]).data.name
    added = real | {"run": real["run"] | {name: data}, "data": real["data"] | {data: {}}}
    assert compose_experiment(added, name).name == name


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a params.yaml in which the command runs."""
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    monkeypatch.setattr(params_file, "PARAMS", tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compose", *words])
    stage.main()


@pytest.mark.parametrize(
    ("kind", "name"), [("experiment", "cifar10_resnet"), ("experiment", "facades_pix2pix"), ("data", "imdb")]
)
def test_a_composed_file_names_no_machine_and_no_date(
    kind: str, name: str, command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = command / ("data/imdb.yaml" if kind == "data" else f"experiments/{name}/config.yaml")
    call(monkeypatch, kind, name)
    first = written.read_bytes()
    call(monkeypatch, kind, name)
    assert written.read_bytes() == first
    text = first.decode()
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert not re.search(r"\b20\d\d-\d\d", text)
    assert "${" not in text  # resolved
    assert not re.search(r": '?/", text)  # no absolute path


def test_a_data_file_excludes_the_loader(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "data", "cifar10")
    content = yaml.safe_load((command / "data" / "cifar10.yaml").read_text())
    assert content.keys() == {"defaults", "hydra", "profile", "data", "packing"}
    assert "loader" not in content["data"]
    assert content["data"]["val_fraction"] == 0.1


@pytest.mark.parametrize("number", ["1e-5", "1e-05", "0.00001"])
def test_a_number_is_read_as_dvc_writes_it(number: str, command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command / "params.yaml").write_text(
        yaml.safe_dump(params("imdb_lstm", overrides={"model": {"optimizer": {"lr": "NUMBER"}}})).replace(
            "NUMBER", number
        )
    )
    call(monkeypatch, "experiment", "imdb_lstm")
    content = yaml.safe_load((command / "experiments" / "imdb_lstm" / "config.yaml").read_text())
    assert content["model"]["optimizer"]["lr"] == 1e-5


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("profile: sample", "profil: sample", "profile: not given"),
        ("overrides:", "overides:", "experiments.cifar10_resnet.overides: unknown key; allowed: overrides. Did you"),
        (
            "overrides:",
            "overrides: [seed=1]\n    x:",
            "experiments.cifar10_resnet.overrides: ['seed=1'] is not allowed",
        ),
        ("profile: sample", "profile: [", "is not valid YAML: "),
    ],
)
def test_a_fault_in_params_is_refused_with_its_place(
    old: str,
    new: str,
    line: str,
    command: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = command / "params.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch)
    assert end.value.code == 2
    assert f"configuration refused: params.yaml: {line}" in capsys.readouterr().err
    assert [path.name for path in command.rglob("*")] == ["params.yaml"]


@pytest.mark.parametrize(("kind", "name"), [("experiment", "mnist"), ("data", "mnist")])
def test_an_unknown_name_ends_with_2_and_one_line(
    kind: str, name: str, command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, kind, name)
    assert end.value.code == 2
    assert capsys.readouterr().err == "configuration refused: mnist: not in params.yaml\n"
    assert [path.name for path in command.rglob("*")] == ["params.yaml"]
