"""Composition of conf/, refusals and their wording, and both as commands."""

from __future__ import annotations

import importlib
import inspect
import re
import resource
from pathlib import Path
from typing import Any, Literal

import hydra
import pytest
import yaml

from src.common.errors import ConfigError
from src.common.paths import CONF, ROOT
from src.common.yaml_files import read_yaml
from src.configuration.composing import check, compose, quoted, write_resolved
from src.configuration.describing import conf_comments, keys_of
from src.configuration.schema import Adam, Config, DataConfig, Fraction, Section, Step
from src.configuration.targets import attribute_of, parameters_of, targets_in
from tests.conftest import Run

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
PROFILES = sorted(path.stem for path in (CONF / "profile").glob("*.yaml"))
CIFAR = "experiment=cifar10_resnet"


def composed(*overrides: str, experiment: str = CIFAR) -> Config:
    return compose([experiment, "output=out", *overrides])


def refusal(*overrides: str) -> str:
    """The only line of a refusal."""
    with pytest.raises(ConfigError) as error:
        compose(["output=out", *overrides])
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the content of conf/ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_in_every_profile(name: str, profile: str) -> None:
    config = compose([f"experiment={name}", f"profile={profile}", "output=out"])
    assert (config.name, config.profile.name) == (name, profile)
    assert config.description


@pytest.mark.parametrize(
    ("choice", "key", "value"),
    [
        ("trainer=cpu", "trainer.accelerator", "cpu"),
        ("trainer=gpu", "trainer.accelerator", "gpu"),
        ("trainer=ddp", "trainer.strategy", "ddp"),
        ("debug=fast", "trainer.limit_train_batches", 2),
        ("debug=overfit", "trainer.overfit_batches", 3),
        ("debug=profile", "trainer.profiler", "simple"),
        ("model=resnet18", "model.network._target_", "src.models.resnet.resnet18"),
        ("model=fast_resnet", "model.network._target_", "src.models.resnet.FastResNet"),
        ("data=fashion_mnist", "data.name", "fashion_mnist"),
        ("data=horse_or_zebra", "data.classes", ["horse", "zebra"]),
    ],
)
def test_a_choice_in_a_group_takes_effect(choice: str, key: str, value: Any) -> None:
    content: Any = composed(choice).plain()
    for part in key.split("."):
        content = content[part]
    assert content == value


def test_the_dense_autoencoder_takes_the_place_of_the_convolutional_one() -> None:
    config = compose(["experiment=mnist_autoencoder", "model=autoencoder_dense", "output=out"])
    assert config.plain()["model"]["network"]["_target_"] == "src.models.autoencoder.DenseCoder"


def test_every_option_of_every_group_is_tested() -> None:
    """A new file in conf/ is composed by a test if it is named above or used in an experiment."""
    tested = {"cpu", "gpu", "ddp", "fast", "overfit", "profile", "resnet18", "fast_resnet", *EXPERIMENTS, *PROFILES}
    tested |= {"fashion_mnist", "autoencoder_dense", "coco_person", "ssdlite"}
    for name in EXPERIMENTS:
        for default in yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())["defaults"]:
            if isinstance(default, dict):  # else another experiment, tested as well
                tested |= set(default.values())
    assert {path.stem for path in CONF.glob("*/*.yaml")} == tested


def test_a_seed_of_zero_stays_zero() -> None:
    assert composed().seed == 0
    assert composed("seed=0").seed == 0
    assert composed("seed=7").seed == 7


def test_the_command_line_beats_the_experiment_wherever_it_stands() -> None:
    imdb = "experiment=imdb_lstm"
    assert composed(experiment=imdb).trainer.gradient_clip == 1.0
    assert compose(["trainer.gradient_clip=2.0", imdb, "output=out"]).trainer.gradient_clip == 2.0
    assert composed("trainer.gradient_clip=2.0", experiment=imdb).trainer.gradient_clip == 2.0


def test_debug_beats_the_experiment_and_the_command_line_beats_debug() -> None:
    assert composed("debug=fast").trainer.max_epochs == 1
    assert compose(["debug=fast", CIFAR, "output=out"]).trainer.max_epochs == 1
    assert composed("debug=fast", "trainer.max_epochs=3").trainer.max_epochs == 3
    assert composed("debug=null").trainer.max_epochs == composed().trainer.max_epochs


def test_an_experiment_is_chosen_with_a_plus_and_without() -> None:
    assert (
        compose(["+experiment=imdb_lstm", "output=out"]).plain() == composed(experiment="experiment=imdb_lstm").plain()
    )


def test_by_profile_picks_by_profile() -> None:
    epochs = "trainer.max_epochs='${by_profile:{sample: 2, full: 3}}'"
    assert composed(epochs).trainer.max_epochs == 2
    assert composed(epochs, "profile=full").trainer.max_epochs == 3


def test_by_profile_without_a_value_for_the_profile_is_refused() -> None:
    message = refusal(CIFAR, "trainer.max_epochs='${by_profile:{full: 3}}'")
    assert message.startswith("trainer.max_epochs: ")
    assert "no value for profile 'sample'; it has full" in message


ODD = [
    "a=b",
    "a (1),b",
    "ü/ß.tar",
    "https://host/x?sig=A%2B&b=[1],{2}",
    "1e5",
    "'quoted'",
    'a"b',
    "~/x",
    "a: b # c",
    "null",
]


@pytest.mark.parametrize("text", ODD)
def test_a_text_or_a_path_needs_no_quotes_of_hydra_s(text: str) -> None:
    config = composed(f"data.archive={text}")
    assert config.data.archive == {"'quoted'": "quoted", "null": None}.get(text, text)


def test_an_interpolation_in_a_path_is_resolved() -> None:
    assert composed("data.archive=~/${seed}=(1)/${name}.tar", "seed=7").data.archive == "~/7=(1)/cifar10_resnet.tar"


# --- sections that replace each other ---------------------------------------------------------------------------------


def test_an_optimizer_is_replaced_not_merged() -> None:
    optimizer = composed("model.optimizer={name: adam, lr: 0.01}").plain()["model"]["optimizer"]
    assert optimizer == Adam(name="adam", lr=0.01).model_dump()


def test_a_schedule_is_replaced_not_merged() -> None:
    schedule = composed("model.schedule={name: step, milestones: [0.5, 0.8]}").plain()["model"]["schedule"]
    assert schedule == Step(name="step", milestones=[0.5, 0.8]).model_dump()


def test_a_null_is_replaced_by_a_section() -> None:
    assert composed().trainer.early_stopping is None
    stopping = composed("trainer.early_stopping={patience: 3}").trainer.early_stopping
    assert stopping is not None
    assert (stopping.patience, stopping.min_delta) == (3, 0.0)


def test_precision_32_may_be_an_integer() -> None:
    assert composed("trainer.precision=32").trainer.precision == "32"


def test_an_integer_is_a_valid_learning_rate() -> None:
    rate = composed("model.optimizer.lr=1").plain()["model"]["optimizer"]["lr"]
    assert rate == 1.0


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sed=1", ["sed: unknown key", "allowed: ", "seed", "Did you mean 'seed'?"]),
        ("+sed=1", ["sed: unknown key", "Did you mean 'seed'?"]),
        (
            "model.optimizer.lrr=1",
            ["model.optimizer.lrr: unknown key", "allowed: lr, momentum, name, rest", "Did you mean 'lr'?"],
        ),
        (
            "model.network.widht=8",
            ["model.network.widht: unknown key; allowed: _target_, width. Did you mean 'width'?"],
        ),
        ("data.loader.batchsize=8", ["data.loader.batchsize: unknown key", "Did you mean 'batch_size'?"]),
        ("evaluation.mistaks=3", ["evaluation.mistaks: unknown key", "Did you mean 'mistakes'?"]),
        ("trainer.max_epochs=many", ["trainer.max_epochs: 'many' is not allowed", "valid integer"]),
        ("seed=1.5", ["seed: 1.5 is not allowed", "valid integer"]),
        ("seed=-1", ["seed: -1 is not allowed", "greater than or equal to 0"]),
        ("seed=null", ["seed: None is not allowed", "valid integer"]),
        ("trainer.max_epochs='3'", ["trainer.max_epochs: '3' is not allowed", "valid integer"]),
        ("trainer.deterministic=1", ["trainer.deterministic: 1 is not allowed", "valid boolean"]),
        ("model.optimizer.lr=-0.1", ["model.optimizer.lr: -0.1 is not allowed", "greater than 0"]),
        ("model.optimizer.lr=nan", ["model.optimizer.lr: nan is not allowed", "finite"]),
        ("model.optimizer.lr=true", ["model.optimizer.lr: True is not allowed", "valid number"]),
        ("data.val_fraction=1", ["data.val_fraction: 1 is not allowed", "less than 1"]),
        ("data.sha256=abc", ["data.sha256: 'abc' is not allowed", "[0-9a-f]{64}"]),
        ("name=a/b", ["name: 'a/b' is not allowed"]),
        (
            "model.schedule={name: step, milestones: [0.5, 2]}",
            ["model.schedule.milestones.1: 2 is not allowed", "less than or equal to 1"],
        ),
        (
            "model.optimizer.name=adamm",
            ["model.optimizer.name: 'adamm' is unknown; allowed: adam, adamw, muon, sgd. Did you mean 'adam'?"],
        ),
        (
            "model.optimizer=adam",
            ["model.optimizer: 'adam' has no name; allowed: {name: X, ...}", "adam, adamw, muon, sgd"],
        ),
        ("model.optimizer={lr: 0.1}", ["model.optimizer: {'lr': 0.1} has no name", "adam, adamw, muon, sgd"]),
        ("model.optimizer={name: sgd}", ["model.optimizer.lr: not given"]),
        ("~model.optimizer.lr", ["model.optimizer.lr: not given"]),
        ("trainer.early_stopping={}", ["trainer.early_stopping.patience: not given"]),
        (
            "data.loader.flip=alternate",
            [
                "data.loader.flip: 'alternate' is unknown; allowed: alternating, none, random",
                "Did you mean 'alternating'?",
            ],
        ),
        (
            "trainer.limit_train_batches=1.0",
            ["trainer.limit_train_batches: 1.0 is not allowed: 1 is one batch, and null"],
        ),
        (
            "model.schedule={name: linear, warmup: 0.75, hold: 0.5}",
            ["model.schedule.hold: 0.5 is not allowed: with a warmup of 0.75 at most 0.25 of the steps are left"],
        ),
        ("profile=ful", ["profile=ful: unknown; allowed: full, sample. Did you mean 'full'?"]),
        ("trainer=gpuu", ["trainer=gpuu: unknown; allowed: cpu, ddp, gpu. Did you mean 'gpu'?"]),
        ("model=resnt18", ["model=resnt18: unknown; allowed: ", "Did you mean 'resnet18'?"]),
        ("data=null", ["data: not given"]),
        ("+profile=null", ["+profile=null: null is no option of a group; write profile=NAME"]),
        ("=1", ["=1: has no key before the =; write key=value"]),
        ("seed=[1", ["[1"]),
        ("seed=${sede}", ["seed: ", "'sede' not found"]),
        (
            "model=lstm",
            [
                "data: cifar10 holds images, and src.models.lstm.TextClassifier (classification) takes text",
                "data sets that fit: imdb",
            ],
        ),
        ("model=pix2pix", ["data: cifar10 holds images", "(translation) takes pairs; data sets that fit: facades"]),
        ("data=imdb", ["data: imdb holds text", "takes images; data sets that fit: cifar10, fashion_mnist"]),
        (
            "data.loader.max_tokens=4",
            ["data.loader.max_tokens: unknown key; allowed: batch_size, crop_padding", "(max_tokens is for text)"],
        ),
        ("data.loader.enlarge=1.0", ["data.loader.enlarge: unknown key", "(enlarge is for pairs)"]),
        (
            "evaluation.judge_steps=3",
            [
                "evaluation.judge_steps: unknown key; allowed: calibration_bins, mistakes",
                "(judge_steps is for generation and reconstruction)",
            ],
        ),
        (
            "trainer.monitor=val_acuracy",
            [
                "trainer.monitor: 'val_acuracy' is not measured by classification; allowed: val_accuracy, val_loss",
                "Did you mean 'val_accuracy'?",
            ],
        ),
        ("trainer.monitor=train_loss", ["trainer.monitor: 'train_loss' is not measured by classification"]),
        ("trainer.mode=max", ["trainer.mode: unknown key"]),
    ],
)
def test_a_fault_is_refused_in_one_line_with_path_value_and_allowed_values(override: str, parts: list[str]) -> None:
    message = refusal(CIFAR, override)
    for part in parts:
        assert part in message


def test_an_unknown_experiment_is_refused_with_the_nearest_name() -> None:
    expected = f"experiment=cifar10_resnt: unknown; allowed: {', '.join(EXPERIMENTS)}. Did you mean 'cifar10_resnet'?"
    assert refusal("experiment=cifar10_resnt") == refusal("+experiment=cifar10_resnt") == expected


def test_a_missing_experiment_is_refused_with_all_names() -> None:
    message = refusal()
    assert message.startswith("experiment: not given")
    for name in EXPERIMENTS:
        assert f"+experiment={name}" in message


def test_several_faults_have_a_line_each() -> None:
    with pytest.raises(ConfigError) as error:
        composed("seed=-1", "trainer.max_epochs=0", "model.optimizer.lrr=1")
    paths = [line.partition(":")[0] for line in str(error.value).splitlines()]
    assert sorted(paths) == ["model.optimizer.lrr", "seed", "trainer.max_epochs"]


def test_keys_of_another_optimizer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.optimizer\.momentum: unknown key; allowed: beta1, beta2, l1, lr"):
        composed("model.optimizer.name=adam")


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "src.train.train",
        "src.datas.x.X",
        "src.data",
        "src.data.sets.cifar10.",
        "src.data.__import__('os')",
        "builtins.eval",
    ],
)
def test_a_target_outside_the_rooms_is_refused(target: str) -> None:
    content = composed().plain()
    content["model"]["_target_"] = target
    with pytest.raises(ConfigError) as error:
        check(content)
    message = f"model._target_: {target!r} is not allowed: only src.data.* and src.models.* are instantiated"
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model._target_=os.system", ["model._target_: 'os.system' is not allowed", "src.data.* and src.models.*"]),
        ("model.network._target_=src.train.train", ["model.network._target_: 'src.train.train' is not allowed"]),
        (
            "model._target_=src.models.clasifier.ImageClassifier",
            [
                "model._target_: 'src.models.clasifier",
                "no file src/models/clasifier.py",
                "Did you mean 'src.models.classifier'?",
            ],
        ),
        (
            "data._target_=src.data.sets.cifar10.Cifar100",
            ["data._target_: 'src.data.sets.cifar10.Cifar100' is not there", "has Cifar10", "Did you mean 'Cifar10'?"],
        ),
        (
            "data._target_=src.data.fetching.download._move",
            ["data._target_: 'src.data.fetching.download._move' is not there"],
        ),  # private
        (
            "data._target_=src.data.fetching.download.shutil",
            ["data._target_: 'src.data.fetching.download.shutil' is not there"],
        ),  # imported
        ("~model.network._target_", ["model.network._target_: not given"]),
    ],
)
def test_an_unknown_or_foreign_target_is_refused(override: str, parts: list[str]) -> None:
    message = refusal(CIFAR, override)
    for part in parts:
        assert part in message


SOURCES = {
    "base.py": """
from typing import Literal
from src.configuration.schema import Fraction
from src.models.toy_constants import WIDTH

Loss = Literal["mild", "harsh"]
RATE = 0.5

class _Base:
    task = "classification"

    def __init__(self, meta, *, rate: Fraction = RATE, loss: Loss = "mild", width: int = WIDTH): ...
""",
    "toy_constants.py": "WIDTH = 7\n",
    "toy.py": "from src.models.base_of_toys import _Base\n\nclass Toy(_Base):\n    takes = ('text',)\n",
}


def test_a_constructor_and_a_task_are_inherited_and_constants_and_aliases_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "src" / "models"
    folder.mkdir(parents=True)
    for name, source in SOURCES.items():
        (folder / name.replace("base", "base_of_toys")).write_text(source)
    monkeypatch.setattr("src.configuration.targets.ROOT", tmp_path)
    assert parameters_of("src.models.toy.Toy") == {
        "rate": (Fraction, 0.5),
        "loss": (Literal["mild", "harsh"], "mild"),
        "width": (int, 7),
    }
    assert attribute_of("src.models.toy.Toy", "task") == "classification"
    assert attribute_of("src.models.toy.Toy", "takes") == ("text",)
    assert attribute_of("src.models.toy.Toy", "kind") is None


def targets_of_conf() -> list[str]:
    files = [path for path in CONF.rglob("*.yaml") if "_target_" in path.read_text()]
    return sorted({target for path in files for _, target in targets_in(yaml.safe_load(path.read_text()))})


@pytest.mark.parametrize(
    "target",
    [*targets_of_conf(), "src.data.sets.image_folder.ImageFolders", "src.data.sets.text_tables.TextTables"],
)
def test_the_parameters_read_from_the_source_are_those_of_the_real_signature(target: str) -> None:
    module_name, _, attribute = target.rpartition(".")
    definition = getattr(importlib.import_module(module_name), attribute)
    names = (definition.__init__ if inspect.isclass(definition) else definition).__globals__
    signature = {
        name: (eval(keyword.annotation, names), ... if keyword.default is keyword.empty else keyword.default)
        for name, keyword in inspect.signature(definition).parameters.items()
        if keyword.kind is keyword.KEYWORD_ONLY
    }
    assert parameters_of(target) == signature


def test_a_section_builds_its_target_with_the_target_s_keys() -> None:
    data = composed("data.val_fraction=0.25", "data.split_seed=3").data()
    assert type(data).__name__ == "Cifar10"
    assert vars(data) == {"val_fraction": 0.25, "split_seed": 3}


# --- checked configurations -------------------------------------------------------------------------------------------


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        composed().seed = 1


def test_packing_excludes_the_loader_and_the_archive() -> None:
    packing = composed().packing
    assert composed("data.loader.batch_size=7", "seed=3", "trainer.max_epochs=1").packing == packing
    assert composed("data.archive=x.tar", f"data.sha256={'0' * 64}", "data.official=null").packing == packing
    assert composed("data.split_seed=7").packing != packing
    assert composed("profile=full").packing != packing


def test_data_folders_are_keyed_by_profile_and_name(tmp_path: Path) -> None:
    config = composed("profile=full")
    assert (config.raw, config.processed) == (ROOT / "data/raw/full/cifar10", ROOT / "data/processed/full/cifar10")
    assert composed(f"data_folder={tmp_path}").raw == tmp_path / "raw" / "sample" / "cifar10"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_resolved_file_composes_to_the_same_configuration(name: str, tmp_path: Path) -> None:
    overrides = [
        "trainer.precision=32",
        "trainer.early_stopping={patience: 2}",
        "description='a: é, \"b\" # c'",
        "model.optimizer.lr=1e-5",
    ]
    config = composed(*overrides, experiment=f"experiment={name}")
    write_resolved(tmp_path / "new" / "config.yaml", config.plain())
    with hydra.initialize_config_dir(str(tmp_path / "new"), version_base="1.3"):
        reread = check(hydra.compose("config"))
        data = check(hydra.compose("config"), DataConfig)
        changed = check(hydra.compose("config", ["seed=5"]))
    assert reread.plain() == config.plain()
    assert changed.plain() == config.plain() | {"seed": 5}
    assert data.packing == config.packing
    assert not hasattr(data, "model")


@pytest.mark.parametrize("text", ["1e5", "1e-05", "0o17", "yes", "null", "12:30:45", "a: é # b"])
def test_a_text_that_looks_like_something_else_stays_a_text(text: str, tmp_path: Path) -> None:
    config = composed(f"description={quoted(text)}")
    write_resolved(tmp_path / "config.yaml", config.plain())
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert check(hydra.compose("config")).description == text
    assert read_yaml(tmp_path / "config.yaml")["description"] == text


# --- as commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["+experiment=cifar10_resnt"], "experiment=cifar10_resnt: unknown; allowed: "),
        (["+experiment=imdb_lstm", "model.optimizer.lr=-1"], "model.optimizer.lr: -1 is not allowed: "),
        (
            ["+experiment=imdb_lstm", "hydra.run.dir=params.yaml/x"],
            "hydra.run.dir: params.yaml/x: cannot be made (Not a",
        ),
    ],
)
def test_a_refused_run_exits_with_2_and_one_line_and_leaves_no_files(
    words: list[str], line: str, run: Run, clone: Path
) -> None:
    def runs() -> list[Path]:
        return sorted((clone / "experiments").glob("runs/*/*"))

    before, spent = runs(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("python", "-m", "src.train", *words, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"configuration refused: {line}")
    assert len(done.stderr.splitlines()) == 1
    # Seconds of this process alone: a busy machine does not count.
    assert after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime < 3
    assert runs() == before


def test_help_shows_examples_groups_and_options(run: Run) -> None:
    text = run("python", "-m", "src.train", "--help").stdout
    assert "python -m src.train +experiment=cifar10_resnet profile=full" in text
    for group in (path.name for path in CONF.iterdir() if path.is_dir()):
        options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        assert re.search(rf"^  {group} +\S", text, re.MULTILINE), group
        assert f"{group}: {options}" in text
    assert "Shell completion: source src/completion.bash" in text
    for line in text[text.index("Keys of this configuration") :].splitlines():
        assert len(line) <= 100


def test_help_shows_each_key_with_its_description_type_and_default(run: Run) -> None:
    text = run("python", "-m", "src.train", "+experiment=cifar10_resnet", "trainer.log_every=7", "--help").stdout
    words = " ".join(text.split())
    config = composed("trainer.log_every=7")
    for prefix, section in {"trainer": config.trainer, "export": config.export, "data": config.data}.items():
        for name, field in type(section).model_fields.items():
            if not isinstance(getattr(section, name), Section):
                assert re.search(rf"^  {prefix}\.{field.alias or name}=\S", text, re.MULTILINE), name
                assert (field.description or "") in words
    assert "trainer.log_every=7" in text
    assert "(int > 0; default 50)" in words
    assert "model.schedule.name=linear" in text
    assert "constant | linear | cosine | step" in words
    assert re.search(r"model\.network\.width=80 +\w.* \(int > 0; default 64\)", words)  # described in conf/model


def test_help_names_the_fault_of_a_refused_configuration(run: Run) -> None:
    text = run("python", "-m", "src.train", "+experiment=imdb_lstm", "trainer.log_evry=7", "--help").stdout
    assert "configuration refused: trainer.log_evry: unknown key" in text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_key_of_an_experiment_has_a_description(name: str) -> None:
    comments: dict[str, str] = {}
    for path in CONF.glob("*/*.yaml"):
        comments |= conf_comments({path.parent.name: path.stem})
    config = composed(experiment=f"experiment={name}")
    assert [key for key, _, field, _ in keys_of(config) if not (field.description or comments.get(key))] == []


def test_shell_completion(run: Run) -> None:
    completion = run("env", "COMP_LINE=train +experiment=cifar10_c", "python", "-m", "src.train", "-sc", "query=bash")
    assert completion.stdout.split() == ["+experiment=cifar10_convnet"]
