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


class LowResolution(Section):
    """Progressive resizing (Howard, 2018): training images are made small at first, which takes less time."""

    size: PositiveInt  # pixels a side
    until: Fraction  # of the run's epochs


class Loader(Section):
    """How batches are made; what applies to one kind of data only is ignored by the others."""

    batch_size: PositiveInt = Field(description="examples per training step, of all processes together")
    eval_batch_size: PositiveInt = Field(default=500, description="examples per batch in validation and evaluation")
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
    """Ends a training whose monitored metric has stopped improving."""

    patience: PositiveInt = Field(description="validations without an improvement after which training ends")
    min_delta: NonNegative = Field(
        default=0.0, description="smallest change that counts as an improvement, in the units of the metric"
    )


# YAML and the command line read 32 as a number.
Precision = Annotated[Literal["auto", "32", "bf16"], BeforeValidator(lambda value: "32" if value == 32 else value)]


class Trainer(Section):
    """How Lightning trains."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field(description="device to train on; auto: a GPU if there is one")
    devices: PositiveInt = Field(default=1, description="processes per node that train one model")
    num_nodes: PositiveInt = Field(default=1, description="machines that train one model")
    strategy: Literal["auto", "ddp"] = Field(
        default="auto", description="auto: DDP with more than one process; ddp: always"
    )
    precision: Precision = Field(
        default="auto", description="of matrix products; auto: bf16 where the hardware multiplies it, else 32 bit"
    )
    channels_last: bool = Field(default=True, description="memory layout of images that is faster for convolutions")
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    threads: PositiveInt | None = Field(
        default=None, description="CPU threads per process; null: all cores; another number gives other bits"
    )
    deterministic: bool = Field(default=True, description="use deterministic algorithms only")
    max_epochs: PositiveInt = Field(description="epochs of training")
    gradient_clip: Positive | None = Field(default=None, description="largest norm of the gradient; null: no clipping")
    validate_every: PositiveInt = Field(default=1, description="epochs from one validation to the next")
    log_every: PositiveInt = Field(default=50, description="steps from one point of the training loss to the next")
    limit_train_batches: Limit | None = Field(
        default=None, description="batches per training epoch, as a number or a fraction; null: all"
    )
    limit_val_batches: Limit | None = Field(
        default=None, description="batches per validation, as a number or a fraction; null: all"
    )
    limit_test_batches: Limit | None = Field(
        default=None, description="batches of the test split, as a number or a fraction; null: all"
    )
    overfit_batches: NonNegativeInt = Field(default=0, description="train on the same batches only, so many; 0: on all")
    monitor: str = Field(description="validation metric that keep=best and early_stopping compare, as val_accuracy")
    mode: Literal["min", "max"] = Field(description="whether the monitored metric is better when smaller or larger")
    keep: Literal["last", "best"] = Field(
        default="last", description="epoch whose weights are kept: the last, or the best by monitor"
    )
    checkpoint_seconds: NonNegative = Field(
        default=60.0, description="seconds between working checkpoints within an epoch, for resuming; 0: every batch"
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="null: train for max_epochs; e.g. {patience: 3}"
    )
    profiler: Literal["simple", "advanced"] | None = Field(
        default=None, description="Lightning's profiler; its table is printed at the end"
    )

    @property
    def processes(self) -> int:
        """The number of processes that train one model, on all nodes."""
        return self.devices * self.num_nodes

    @property
    def distributed(self) -> bool:
        """Whether the model is trained with DDP."""
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
    """The exported model: format, tolerance, and how its latency is measured."""

    opset: Annotated[int, Field(ge=18, le=23)] = Field(default=18, description="version of the ONNX operators")
    tolerance: Positive = Field(default=1e-3, description="largest difference between the outputs of ONNX and PyTorch")
    int8: bool = Field(default=False, description="also write model.int8.onnx, for networks of convolutions")
    latency_batches: list[PositiveInt] = Field(
        default=[1, 32], description="batch sizes for which the latency is measured"
    )
    latency_seconds: Positive = Field(default=1.0, description="length of the measurement per batch size and engine")


class Profile(Section):
    """The size of the data: an embedded sample, or the official sets."""

    name: Literal["sample", "full"] = Field(description="sample: embedded and offline; full: the official archives")
    note: str = Field(description="text beside figures of this profile")


class DataConfig(Section):
    """The keys that download and preprocess read."""

    profile: Profile
    data: Data
    data_folder: str = Field(
        default="data", description="folder of the packed data; a direct run with other packing has its own"
    )
    archive_folder: str | None = Field(default=None, description="folder of the raw archive; null: data_folder")

    @property
    def packing(self) -> dict[str, Any]:
        """How the archive is packed: the profile, and the data section without source and loader."""
        excluded = ("official", "archive", "sha256", "loader")
        return {"profile": self.profile.name} | {k: v for k, v in plain(self.data).items() if k not in excluded}

    @property
    def raw(self) -> Path:
        """The folder of the raw archive."""
        return ROOT / (self.archive_folder or self.data_folder) / "raw" / self.profile.name / self.data.name

    @property
    def processed(self) -> Path:
        """The folder of the packed splits."""
        return ROOT / self.data_folder / "processed" / self.profile.name / self.data.name


class Config(DataConfig):
    """A complete, checked configuration."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        description="name of the experiment, of its output folder and of its MLflow experiment"
    )
    description: str = Field(default="", description="a sentence for the model card and for MLflow")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(description="seed of weights, order, augmentation and dropout")
    model: Build
    trainer: Trainer
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    output: str = Field(description="folder of the run, relative to the repository")

    @property
    def folder(self) -> Path:
        """The folder that this run's stages write to."""
        return ROOT / self.output

    @property
    def label(self) -> str:
        """A title for pictures: experiment, profile, seed."""
        return f"{self.name} · {self.profile.name} · seed {self.seed}"

    @property
    def run_name(self) -> str:
        """The name of the run in MLflow."""
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
        """The configuration as nested dicts, for YAML and MLflow."""
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
