"""What a configuration may say: its sections, their types and ranges.

Nothing here imports torch: a typing mistake is answered in half a second.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from src.common.errors import ConfigError
from src.common.hardware import cores
from src.common.paths import ROOT

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


class Loader(Section):
    """How batches are made, whatever the kind of data; src/data/kinds/ adds what a kind has besides."""

    batch_size: PositiveInt  # of all processes together
    eval_batch_size: PositiveInt = 500


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
    monitor: str  # a metric of the model's task, as val_accuracy; the task says whether more or less of it is better
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
    """What evaluate measures and shows: the options of the model's task, in src/tasks/."""


class Export(Section):
    """What is exported, how far it may be from the original, and how its latency is measured."""

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
    data_folder: str = "data"  # DVC's; a direct run that needs data packed in another way has a folder of its own
    archive_folder: str | None = None  # null: the raw archive lies in data_folder as well

    @property
    def packing(self) -> dict[str, Any]:
        """How the archive is packed: the profile, and the data section without its archive and its batches."""
        elsewhere = ("official", "archive", "sha256", "loader")
        return {"profile": self.profile.name} | {k: v for k, v in plain(self.data).items() if k not in elsewhere}

    @property
    def raw(self) -> Path:
        """The folder of the raw archive."""
        return ROOT / (self.archive_folder or self.data_folder) / "raw" / self.profile.name / self.data.name

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


def plain(value: Any) -> Any:
    """A section as nested dicts, lists and scalars."""
    if isinstance(value, pydantic.BaseModel):
        fields = {key: getattr(value, key) for key in type(value).model_fields}
        names = {key: field.alias or key for key, field in type(value).model_fields.items()}
        return {names.get(k, k): plain(v) for k, v in (fields | (value.model_extra or {})).items()}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
