"""What a configuration may say: its types and ranges, how it is composed, and how it is refused.

`conf/` says everything. Hydra composes it, `check` holds the result against the schema below, and a stage works with
the checked `Config`. Nothing here imports torch: a typing mistake is answered in half a second.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import importlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from src.dvc_stage import end_with_dvc, put_back_outputs
from src.errors import NO_ROOM, Failure

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

# Where a `_target_` may point: code execution is allowed in these rooms of this repository and nowhere else.
TARGET_ROOMS = ("src.data.", "src.models.")


class ConfigError(Failure):
    """One line per fault: the key's path, the value, what is allowed."""


# --- the vocabulary of the schema: used here, and by the signatures that a `_target_` points to -----------------------

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Limit = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _refuse_step(given: Any) -> Any:
    """A step's derivative is zero wherever it has one: no gradient passes it, and what is before it never learns."""
    if given == "step":
        raise PydanticCustomError(
            "no_gradient",
            "its derivative is zero, so nothing before it would learn; sigmoid is its smooth form, relu learns faster",
        )
    return given


Activation = Annotated[Literal["relu", "tanh", "sigmoid", "leaky_relu", "gelu"], BeforeValidator(_refuse_step)]


class Section(pydantic.BaseModel):
    """A part of the configuration: strict types, no unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class SGD(Section):
    """Stochastic gradient descent with momentum (Nesterov's by default)."""

    name: Literal["sgd"]
    lr: Positive
    momentum: Probability = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 0.0  # L2
    l1: NonNegative = 0.0  # times the sum of the weights' magnitudes, biases left out
    # Biases of norms and of frozen layers learn this many times faster (airbench: 64).
    norm_bias_lr_factor: Positive = 1.0


class Muon(Section):
    """Momentum, orthogonalised, for the filters of convolutions (Jordan et al., 2024); `rest` is for all else."""

    name: Literal["muon"]
    lr: Positive
    momentum: Probability = 0.6
    rest: SGD

    @pydantic.field_validator("rest")
    @classmethod
    def _without_l1(cls, rest: SGD) -> SGD:
        if rest.l1:
            raise PydanticCustomError("l1", "Muon keeps each filter's norm, so an l1 has nothing to shrink; use sgd")
        return rest


class Adam(Section):
    """Adam (Kingma and Ba, 2015); weight decay is L2."""

    name: Literal["adam"]
    lr: Positive
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    weight_decay: NonNegative = 0.0
    l1: NonNegative = 0.0  # as SGD's


class AdamW(Section):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    name: Literal["adamw"]
    lr: Positive
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    weight_decay: NonNegative = 0.01
    l1: NonNegative = 0.0  # as SGD's


class Constant(Section):
    """The rate stays."""

    name: Literal["constant"]


class Linear(Section):
    """The rate rises over the fraction `warmup` of all steps, holds over `hold`, then falls linearly.

    It ends at `final` times itself.
    """

    name: Literal["linear"]
    warmup: Fraction = 0.0
    hold: Fraction = 0.0
    final: Fraction = 0.0


class Cosine(Section):
    """The rate rises over the fraction `warmup` of all steps, then falls along half a cosine.

    It ends at `final` times itself.
    """

    name: Literal["cosine"]
    warmup: Fraction = 0.0
    final: Fraction = 0.0


class Step(Section):
    """The rate is multiplied by `factor` at each of `milestones` (fractions of all steps)."""

    name: Literal["step"]
    milestones: list[Fraction]
    factor: Positive = 0.1


def _name_of(value: Any) -> str:
    """The tag of a union's section; without a name it is no section's tag, and the fault lists those that there are."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return "" if name is None else str(name)


def _one_of(*sections: type[Section]) -> Any:
    """A union of sections that tell themselves apart by `name`."""
    union: Any = None
    for section in sections:
        (name,) = get_args(section.model_fields["name"].annotation)
        tagged = Annotated[section, Tag(name)]  # type: ignore[valid-type]  # a type made at run time
        union = tagged if union is None else union | tagged
    return Annotated[union, Discriminator(_name_of)]


Optimizer = _one_of(SGD, Muon, Adam, AdamW)
Schedule = _one_of(Constant, Linear, Cosine, Step)


class Build(Section):
    """A section that names, by `_target_`, the class or function that its other keys are given to.

    The other keys are the target's own keyword-only parameters: see `parameters_of`.
    """

    model_config = pydantic.ConfigDict(populate_by_name=True)
    target: str = Field(alias="_target_")

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Builds it, with what only the caller knows as further arguments."""
        module, _, attribute = self.target.rpartition(".")
        general = type(self).__base__.model_fields  # type: ignore[union-attr]
        own = {key: getattr(self, key) for key in type(self).model_fields if key not in general}
        return getattr(importlib.import_module(module), attribute)(*args, **more, **own)


class LowResolution(Section):
    """Progressive resizing (Howard, 2018): training images are made small at first, which takes less time."""

    size: PositiveInt  # pixels a side
    until: Fraction  # of the run's epochs


class Loader(Section):
    """How batches are made; what applies to one kind of data only is ignored by the others."""

    batch_size: PositiveInt
    eval_batch_size: PositiveInt = 500
    flip: Literal["none", "random", "alternating"] = (
        "none"  # alternating: random at first, then every second epoch mirrored
    )
    crop_padding: NonNegativeInt = 0  # pixels of reflection from which a random crop of the old size is taken
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0  # images: turned by up to so many degrees, either way
    low_resolution: LowResolution | None = None  # images
    enlarge: Annotated[float, Field(ge=1, le=4)] = 1.0  # pairs: so much before a random crop of the old size
    max_tokens: PositiveInt | None = None  # text: longer examples lose their middle
    word_dropout: Probability = 0.0  # text: tokens become <unk> with this probability


class Official(Section):
    """Where the official data lies: an archive, or a folder of files."""

    urls: Annotated[list[str], Field(min_length=1)]  # mirrors, in order: of the archive, or of the folder
    files: dict[str, Sha256] | None = None  # of the folder, by name; null: an archive
    sha256: Sha256 | None = None  # null: no published checksum is known; the one that was met is recorded


class Data(Build):
    """A data set: where it comes from, how it is packed, how it is batched."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    official: Official | None = None
    archive: str | None = (
        None  # a path or URL of an archive (or folder) that the user has, taken instead of the official one
    )
    sha256: Sha256 | None = None  # that archive's
    loader: Loader | None = None


class EarlyStopping(Section):
    patience: PositiveInt
    min_delta: NonNegative = 0.0


# YAML and the command line read 32 as a number.
Precision = Annotated[Literal["auto", "32", "bf16"], BeforeValidator(lambda given: "32" if given == 32 else given)]


class Trainer(Section):
    """How Lightning trains."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Precision = "auto"
    channels_last: bool = True
    compile: bool = False
    threads: PositiveInt | None = None
    deterministic: bool = True
    max_epochs: PositiveInt
    gradient_clip: Positive | None = None
    validate_every: PositiveInt = 1
    log_every: PositiveInt = 50
    limit_train_batches: Limit | None = None
    limit_val_batches: Limit | None = None
    limit_test_batches: Limit | None = None
    overfit_batches: NonNegativeInt = 0
    monitor: str
    mode: Literal["min", "max"]
    keep: Literal["last", "best"] = "last"
    checkpoint_seconds: NonNegative = 60.0
    early_stopping: EarlyStopping | None = None
    profiler: Literal["simple", "advanced"] | None = None

    @property
    def processes(self) -> int:
        """How many processes train one model, on all nodes."""
        return self.devices * self.num_nodes

    @property
    def distributed(self) -> bool:
        """Whether the model is DDP's."""
        return self.strategy == "ddp" or self.processes > 1

    @property
    def threads_each(self) -> int | None:
        """Threads of each process: those asked for, or its share of the cores; None leaves it to torch."""
        return self.threads if self.threads or self.devices == 1 else max(1, cores() // self.devices)


class Evaluation(Section):
    """What evaluate shows beside the metrics."""

    calibration_bins: PositiveInt = 15
    mistakes: PositiveInt = 16
    examples: PositiveInt = 6
    segmenter_epochs: PositiveInt = 12
    segmenter_width: PositiveInt = 16
    judge_steps: PositiveInt = 1000  # of the judge of drawn images, batches of 128


class Export(Section):
    """What is exported, how far it may be from the original, and how its latency is measured."""

    opset: Annotated[int, Field(ge=18, le=23)] = 18
    tolerance: Positive = 1e-3
    int8: bool = False  # model.int8.onnx beside model.onnx, for networks of convolutions
    latency_batches: list[PositiveInt] = [1, 32]
    latency_seconds: Positive = 1.0


class Profile(Section):
    name: Literal["sample", "full"]
    note: str


class DataConfig(Section):
    """What download and preprocess read."""

    profile: Profile
    data: Data
    data_folder: str = "data"  # DVC's; a direct run that needs data packed in another way has them beside it

    @property
    def packing(self) -> dict[str, Any]:
        """What the packed splits depend on: the profile, and the data section without its batches."""
        return {"profile": self.profile.name} | {k: v for k, v in plain(self.data).items() if k != "loader"}

    @property
    def raw(self) -> Path:
        """The folder of the raw archive."""
        return ROOT / self.data_folder / "raw" / self.profile.name / self.data.name

    @property
    def processed(self) -> Path:
        """The folder of the packed splits."""
        return ROOT / self.data_folder / "processed" / self.profile.name / self.data.name


class Config(DataConfig):
    """A whole configuration, checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    model: Build
    trainer: Trainer
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    output: str

    @property
    def folder(self) -> Path:
        """The folder that this run's stages write to."""
        return ROOT / self.output

    @property
    def label(self) -> str:
        """A title for pictures: which experiment, which data, which seed."""
        return f"{self.name} · {self.profile.name} · seed {self.seed}"

    @property
    def run_name(self) -> str:
        """What the run is called in MLflow's list."""
        return f"seed {self.seed} {self.profile.name}"

    def journal(self, stage: str) -> Path:
        """Where a stage that joins the training's run keeps what MLflow has not got yet."""
        return ROOT / "experiments" / ".work" / f"{self.name}-{stage}-{os.getpid()}.jsonl"

    @property
    def sample(self) -> bool:
        """Whether figures must carry the sample's warning."""
        return self.profile.name == "sample"

    @property
    def loader(self) -> Loader:
        """How batches are made."""
        if self.data.loader is None:
            raise ConfigError("data.loader: not given")
        return self.data.loader

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dicts, as YAML and MLflow want it."""
        return plain(self)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plain(value: Any) -> Any:
    """A section as nested dicts, lists and scalars."""
    if isinstance(value, pydantic.BaseModel):
        fields = {key: getattr(value, key) for key in type(value).model_fields}
        names = {key: field.alias or key for key, field in type(value).model_fields.items()}
        return {names.get(k, k): plain(v) for k, v in (fields | (value.model_extra or {})).items()}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, each value with its keys joined by dots; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@functools.cache
def parameters_of(target: str) -> dict[str, tuple[Any, Any]]:
    """What `target` can be given: its keyword-only parameters as name -> (annotation, default), read from its source.

    The source is parsed, not imported: importing a model means importing torch and Lightning, 4 s that a mistyped key
    should not cost. A parameter's annotation is an expression over this module's vocabulary.

    Raises:
        ValueError: the target is outside the allowed rooms, or is not there.
    """
    module, _, attribute = target.rpartition(".")
    if not (target.startswith(TARGET_ROOMS) and all(part.isidentifier() for part in target.split("."))):
        raise ValueError(f"is not allowed: only {' and '.join(room + '*' for room in TARGET_ROOMS)} are instantiated")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not source.is_file():
        modules = [f"{module.rpartition('.')[0]}.{path.stem}" for path in sorted(source.parent.glob("[a-z]*.py"))]
        raise ValueError(f"is not there: no file {source.relative_to(ROOT)}{_nearest(module, modules)}")
    definitions = {
        node.name: node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    }
    if attribute not in definitions:
        raise ValueError(
            f"is not there: {source.relative_to(ROOT)} has {_listed(definitions)}{_nearest(attribute, definitions)}"
        )
    node: ast.AST | None = definitions[attribute]
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    fields: dict[str, Any] = {}
    if isinstance(node, ast.FunctionDef):
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            try:
                annotation = eval(ast.unparse(argument.annotation), vars(sys.modules[__name__]))  # type: ignore[arg-type]
                fields[argument.arg] = (annotation, ... if default is None else ast.literal_eval(default))
            except (NameError, ValueError):  # a type or default outside the vocabulary
                raise ValueError(f"is nothing to configure: no configuration can give its {argument.arg!r}") from None
    return fields


def _schema_of(base: type[Build], content: Any, path: str) -> type[Build]:
    """`base` with the parameters of the target that `content` names, and so on for the sections in it."""
    target = content.get("_target_") if isinstance(content, Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_: not given")
    try:
        parameters = parameters_of(target)
    except ValueError as error:
        raise ConfigError(f"{path}._target_: {target!r} {error}") from None
    fields: dict[str, Any] = {
        key: (_schema_of(Build, content.get(key), f"{path}.{key}") if annotation is Build else annotation, default)
        for key, (annotation, default) in parameters.items()
    }
    return pydantic.create_model(target.rpartition(".")[2], __base__=base, **fields)


# --- composing, checking, refusing ------------------------------------------------------------------------------------


def _by_profile(values: Any, *, _root_: DictConfig) -> Any:
    name = _root_.profile.name
    if name not in values:
        raise ValueError(f"by_profile has no value for profile {name!r}; it has {_listed(values)}")
    return values[name]


def register_resolvers() -> None:
    """`${by_profile:{sample: 2, full: 12}}` picks by profile.

    `${unique:}` is new in each process, so no two runs share a folder; `${in_repository:PATH}` is the path from the
    repository's root, so that what a run writes about itself does not name this machine's folders.
    """
    OmegaConf.register_new_resolver("by_profile", _by_profile, replace=True)
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("in_repository", lambda path: os.path.relpath(path, ROOT), replace=True)


def check(composed: DictConfig | Mapping[str, Any], schema: type[DataConfig] = Config) -> Any:
    """Holds a composed configuration against the schema.

    Raises:
        ConfigError: with one line per fault.
    """
    register_resolvers()
    try:
        content: Any = composed
        if isinstance(composed, DictConfig):
            content = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        if schema is DataConfig:
            content = {key: content[key] for key in DataConfig.model_fields if key in content}
        sections: dict[str, Any] = {
            key: (_schema_of(base, content[key], key), ...)
            for key, base in (("data", Data), ("model", Build))
            if key in content
        }
        schema = pydantic.create_model(schema.__name__, __base__=schema, **sections)
        checked = schema.model_validate(content)
        if isinstance(checked, Config):
            _refuse_unequal_shares(checked)
        return checked
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(
            "\n".join(dict.fromkeys(_explain(fault, content, schema) for fault in error.errors()))
        ) from None


def _refuse_unequal_shares(config: Config) -> None:
    """Processes' gradients are averaged: with unequal shares of a batch some examples would count more than others."""
    size, processes = config.loader.batch_size, config.trainer.processes
    if size % processes:
        raise ConfigError(
            f"data.loader.batch_size: {size} can't be shared out evenly among {processes} processes (trainer.devices, "
            f"trainer.num_nodes); the next that can is {size + processes - size % processes}"
        )


def overrides_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested values as Hydra's overrides; a null stays a null, `default` leaves conf/'s value alone.

    A section that names itself, such as an optimizer, is exchanged as a whole.
    """
    for key, value in values.items():
        if isinstance(value, Mapping) and "name" not in value:
            yield from overrides_of(value, f"{prefix}{key}.")
        elif value != "default":
            yield f"{prefix}{key}={quoted(value)}"


def quoted(value: Any) -> str:
    """A value in Hydra's grammar, whose strings know no escape but that of a quote."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        return QuotedString(value, Quote.double).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {quoted(item)}' for key, item in value.items() if item != 'default')}}}"
    return json.dumps(value)


def best_of(path: str) -> list[str]:
    """The overrides in a sweep's best.yaml; `path` is relative to the repository's root, or absolute.

    Raises:
        ConfigError: it is not there, or is no mapping.
    """
    try:
        values = yaml.safe_load((ROOT / Path(path).expanduser()).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"best={path}: {' '.join(str(error).split())}; a sweep writes such a file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"best={path}: holds no keys and values; a sweep writes such a file")
    return list(overrides_of(values))


def as_assignments(overrides: list[str]) -> list[str]:
    """Hydra's overrides, made to mean what they look like.

    `a.b=1` is added where it is not there, so that the schema, which knows the nearest name, refuses it instead of
    Hydra; `a.b={...}` replaces a section instead of merging into it, so that an optimizer can be exchanged;
    `+experiment=` is how Hydra's users know it, though the group stands in the defaults list so that `debug` comes
    after it; `debug=null` drops it. `+best=PATH` stands for what a sweep found, see `best_of`; what follows it wins.

    Raises:
        ConfigError: the file of `+best=` can't be read.
    """
    meant: list[str] = []
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    for override in overrides:
        if best := re.fullmatch(r"\+?best=(.+)", override, re.DOTALL):
            meant += as_assignments(best_of(best[1]))
            continue
        found = re.fullmatch(r"(?!hydra\b)(\w+(?:\.\w+)*)=(.*)", override, re.DOTALL)
        if found and found[1] in groups:
            meant.append(f"~{found[1]}" if found[2] == "null" else override)
        elif found and found[2].startswith("{"):
            meant += [f"++{found[1]}=null", f"++{override}"]
        else:
            meant.append(f"++{override}" if found else "experiment=".join(override.split("+experiment=", 1)))
    return meant


def compose(overrides: list[str]) -> Config:
    """Composes `conf/` with Hydra's overrides and checks the result.

    Raises:
        ConfigError: with one line per fault.
    """
    return check(compose_unchecked(overrides))


def compose_unchecked(overrides: list[str]) -> DictConfig:
    """Composes `conf/` with Hydra's overrides; interpolations are not resolved yet.

    Raises:
        ConfigError: Hydra refuses it.
    """
    import hydra
    from hydra.errors import HydraException

    register_resolvers()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", as_assignments(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError) as error:  # OSError: a key too long
        raise ConfigError(explain_hydra(error)) from None


# A stage that is called on a resolved file writes where that file says: Hydra has no folder of its own to make.
RESOLVED_HEAD = {
    "defaults": ["_self_", {"override hydra/job_logging": "stdout"}],
    "hydra": {"run": {"dir": "."}, "output_subdir": None},
}


def write_resolved(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a resolved configuration that the stages can be called on: `-cp FOLDER -cn NAME`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "# Resolved from conf/ (and params.yaml): change those, not this.\n"
    path.write_text(
        header + yaml.safe_dump(RESOLVED_HEAD | dict(content), sort_keys=False, allow_unicode=True, width=120)
    )


def main(stage: Callable[[Any], None], schema: type[DataConfig] = Config) -> Callable[[], None]:
    """Makes a stage's function a command: `@hydra.main` on `conf/`, the schema's check, and one-line errors.

    Exit codes: 0 done, 1 the stage failed, 2 the configuration was refused.
    """
    import hydra
    from hydra.errors import HydraException

    def command() -> None:
        register_resolvers()
        if not {"-sc", "--shell-completion"} & set(sys.argv):  # whose `query=bash` is no key
            try:
                sys.argv[1:] = as_assignments(sys.argv[1:])
            except ConfigError as error:
                sys.exit(refusal(str(error)))
        if {"-h", "--help"} & set(sys.argv) and not re.search(r"experiment=| -cn| --config-name", " ".join(sys.argv)):
            sys.argv.append(f"experiment={_experiments()[0]}")  # help shows a whole configuration
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, so that it can be said better here
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

        def run(composed: DictConfig) -> None:
            try:
                config = check(composed, schema)
            except ConfigError as error:
                _remove_run_folder()
                sys.exit(refusal(str(error)))
            try:
                stage(config)
            except ConfigError as error:
                sys.exit(refusal(str(error)))
            except Failure as error:  # Hydra, which lets an exit pass, would print "Error executing job" before it
                line = " ".join(str(error).splitlines())  # the name of a file may hold a line break
                print(f"{stage.__name__} failed: {line}", file=sys.stderr)
                sys.exit(1)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                what = f"{stage.__name__} failed: no room to write {error.filename or 'its outputs'} ({error.strerror})"
                print(f"{what}: free some space and run the same command again", file=sys.stderr)
                sys.exit(1)

        run.__module__ = "__main__"  # so that Hydra takes a relative `-cp` as relative to src/
        end_with_dvc()
        _guard_hydra()
        try:
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(run)()
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            put_back_outputs()
            sys.exit(refusal(explain_hydra(error)))
        except ConfigError as error:  # the guard's
            put_back_outputs()
            sys.exit(refusal(str(error)))
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                put_back_outputs()
            if isinstance(error, KeyboardInterrupt):
                sys.exit(130)
            raise

    return command


def _guard_hydra() -> None:
    """Has Hydra's own section of a configuration checked before Hydra acts on it.

    Hydra instantiates its callbacks, configures logging by class names and sets environment variables before the schema
    sees anything: a configuration from elsewhere could run whatever is installed. Hydra has no hook for this.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    load = ConfigLoaderImpl.load_configuration

    def guarded(*args: Any, **options: Any) -> DictConfig:
        composed = load(*args, **options)
        _refuse_foreign_code(OmegaConf.to_container(composed.hydra, resolve=False))
        return composed

    ConfigLoaderImpl.load_configuration = guarded  # type: ignore[method-assign]


def _refuse_foreign_code(section: Any) -> None:
    """Raises ConfigError where the section `hydra` names code that is not Hydra's."""
    import hydra

    for path, target in _targets(section, "hydra"):
        if not target.startswith(("hydra._internal.core_plugins.", "hydra_plugins.")):
            raise ConfigError(f"{path}: {target!r} is not allowed: only Hydra's own plugins are instantiated there")
    if section["job"]["env_set"]:  # git and the stages' processes would heed them
        raise ConfigError("hydra.job.env_set: is not allowed: set environment variables in the shell")
    for key in ("hydra_logging", "job_logging"):
        own = Path(hydra.__file__).parent.glob(f"conf/hydra/{key}/*.yaml")
        if not any(section[key] == yaml.safe_load(path.read_text()) for path in own):
            raise ConfigError(f"hydra.{key}: is not allowed: choose one of Hydra's own, as in hydra/{key}=default")


def _targets(section: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every `_target_` in a section, with its path."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            here = f"{path}.{key}"
            yield from [(here, str(value))] if key == "_target_" else _targets(value, here)
    elif isinstance(section, list):
        for place, value in enumerate(section):
            yield from _targets(value, f"{path}.{place}")


def _remove_run_folder() -> None:
    """Removes what Hydra made for a run that is then refused; a stage on a resolved file has no such folder."""
    from hydra.core.hydra_config import HydraConfig

    made = HydraConfig.get()
    if made.output_subdir:
        folder = Path(made.runtime.output_dir)
        shutil.rmtree(folder / made.output_subdir)
        with contextlib.suppress(OSError):  # something else lies in it
            folder.rmdir()


def refusal(lines: str) -> int:
    """Says what was refused, line by line; the exit code for it."""
    for line in lines.splitlines():
        print(f"configuration refused: {line}", file=sys.stderr)
    return 2


def explain_hydra(error: Exception) -> str:
    """What Hydra or OmegaConf refused, in one line with the nearest name."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if options := getattr(error, "options", None):  # a group's choice that is not there
        missing = str(getattr(error, "missing_cfg_file", ""))
        group, _, choice = missing.rpartition("/")
        return f"{group}={choice}: unknown; allowed: {_listed(options)}{_nearest(choice, options)}"
    if "You must specify" in text:
        return f"experiment: not given; say which: {', '.join('+experiment=' + name for name in _experiments())}"
    return text


def _experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def _explain(fault: Any, content: Any, schema: type[Section]) -> str:
    """One line for one of pydantic's faults."""
    keys: list[str] = []
    here: Any = content
    # A union puts its tag or its branch into the path: keep what the content really has.
    for place, part in enumerate(map(str, fault["loc"]), start=1):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, list) and part.isdigit():
            here = here[int(part)]
        elif fault["type"] != "missing" or place < len(fault["loc"]):
            continue
        keys.append(part)
    where, value, context = ".".join(keys) or "configuration", fault["input"], fault.get("ctx", {})
    match fault["type"]:
        case "extra_forbidden":
            allowed = _allowed_keys(schema, keys[:-1], content)
            return f"{where}: unknown key; allowed: {_listed(allowed)}{_nearest(keys[-1], allowed)}"
        case "missing":
            return f"{where}: not given"
        case "union_tag_invalid":
            names = [name.strip(" '") for name in context["expected_tags"].split(",")]
            if not context["tag"]:
                return f"{where}: {value!r} has no name; allowed: {{name: X, ...}}, X one of {_listed(names)}"
            nearest = _nearest(context["tag"], names)
            return f"{where}.name: {context['tag']!r} is unknown; allowed: {_listed(names)}{nearest}"
        case "literal_error":
            names = [name.strip(" '") for name in context["expected"].replace(" or ", ", ").split(",")]
            return f"{where}: {value!r} is unknown; allowed: {_listed(names)}{_nearest(str(value), names)}"
    said = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {value!r} is not allowed: {said[0].lower()}{said[1:]}"


def _allowed_keys(schema: type[Section], path: list[str], content: Any) -> list[str]:
    """The keys that the schema allows at `path`."""
    for key in path:
        content = content[key]
        if key not in schema.model_fields:  # of a mapping of sections, whose field led to their schema
            continue
        named = _sections(schema.model_fields[key].annotation)
        schema = next(
            s for s in named if len(named) == 1 or get_args(s.model_fields["name"].annotation) == (content["name"],)
        )
    return [field.alias or key for key, field in schema.model_fields.items()]


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections(part)]


def _listed(names: Any) -> str:
    return ", ".join(sorted(str(name) for name in names))


def _nearest(name: str, names: Any) -> str:
    found = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f". Did you mean {found[0]!r}?" if found else ""
