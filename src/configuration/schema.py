"""What a configuration may say: its sections, their types and ranges.

Nothing here imports torch: a typing mistake is answered in half a second.
"""

from __future__ import annotations

import codecs
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from src.common.credentials import masked_values
from src.common.errors import ConfigError
from src.common.hardware import cores
from src.common.paths import ROOT
from src.configuration.callbacks import check_callback

# --- the vocabulary of the schema: used here, and by the signatures that a `_target_` points to -----------------------

PositiveInt = Annotated[int, Field(gt=0)]

NonNegativeInt = Annotated[int, Field(ge=0)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Fraction = Annotated[float, Field(ge=0, le=1)]

OpenFraction = Annotated[float, Field(gt=0, lt=1)]

Probability = Annotated[float, Field(ge=0, lt=1)]

ValFraction = Annotated[OpenFraction, Field(description="of the training examples, drawn as the validation split")]

TestFraction = Annotated[
    float, Field(gt=0, lt=1, description="of the examples that become the test split, where the archive has none")
]

Enlarge = Annotated[
    float, Field(ge=1, le=2, description="side of packed training images over `size`: batches are random crops of them")
]

TwoNames = Annotated[list[str], Field(min_length=2, max_length=2)]

SplitSeed = Annotated[NonNegativeInt, Field(description="draws the validation examples; the run's seed does not")]


Fit = Annotated[
    Literal["stretch", "crop", "pad"],
    Field(description="stretch: other proportions; crop: the middle; pad: all of it, with margins of `background`"),
]


ImageSize = Annotated[
    PositiveInt | list[PositiveInt], Field(description="pixels a side, or [height, width], of the packed images")
]

Channels = Annotated[Literal[1, 3], Field(description="3: red, green and blue; 1: grey")]

ManifestFile = Annotated[
    str | None, Field(description="table file of the archive with a row for each image; null: class folders")
]


def _check_colour(name: str) -> str:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise ValueError(f"{name!r} is no colour; give a name such as white, or #rrggbb") from None
    return name


Colour = Annotated[
    str, AfterValidator(_check_colour), Field(description="shown where an image is transparent: a name or #rrggbb")
]

OnBad = Annotated[
    Literal["refuse", "skip"],
    Field(description="what is done about a file that can't be read: refuse the data, or skip and count it"),
]


def _check_encoding(name: str) -> str:
    try:
        codecs.lookup(name)
    except LookupError:
        raise ValueError(f"{name!r} is no encoding that Python knows; give a name such as latin-1 or cp1252") from None
    return name


Encoding = Annotated[
    Annotated[str, AfterValidator(_check_encoding)] | None,
    Field(description="of the texts, e.g. latin-1; null: UTF-8, or what a byte-order mark says"),
]

Dropout = Annotated[Probability, Field(description="probability that a unit is set to zero in training")]

LabelSmoothing = Annotated[Probability, Field(description="share of each label that is spread over all classes")]

LayerDecay = Annotated[
    float,
    Field(gt=0, le=1, description="factor on the learning rate from each layer to the one below it; 1: one for all"),
]

Layers = Annotated[PositiveInt, Field(description="layers on top of each other")]

Width = Annotated[PositiveInt, Field(description="channels of the first layer; the others have multiples of it")]


def _refuse_one(value: Any) -> Any:
    """Refuses 1.0: whether one batch is meant or all of them, it does not say."""
    if isinstance(value, float) and value == 1:
        raise ValueError("1 is one batch, and null is all of them")
    return value


# Batches of an epoch, as a number or a fraction.
Limit = Annotated[Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)], BeforeValidator(_refuse_one)]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Activation = Literal["relu", "tanh", "sigmoid", "leaky_relu", "gelu"]


class Section(pydantic.BaseModel):
    """A part of the configuration: strict types, no unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class SGD(Section):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = Field(description="update rule")
    lr: Positive = Field(description="learning rate")
    momentum: Probability = Field(default=0.9, description="decay of the running sum of gradients")
    nesterov: bool = Field(default=True, description="Nesterov's momentum; has no effect with momentum 0")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty")
    l1: NonNegative = Field(default=0.0, description="L1 penalty on weights; biases and norms carry none")
    norm_bias_lr_factor: Positive = Field(
        default=1.0,
        description="learning rate of the biases of norms and frozen layers, as a multiple of lr (airbench: 64)",
    )


class Muon(Section):
    """Orthogonalised momentum for the filters of convolutions (Jordan et al., 2024), SGD for all other parameters."""

    name: Literal["muon"] = Field(description="update rule")
    lr: Positive = Field(description="learning rate of the filters")
    momentum: Probability = Field(default=0.6, description="Nesterov's momentum of the filters")
    rest: SGD = Field(description="SGD of all other parameters")

    @pydantic.field_validator("rest")
    @classmethod
    def _refuse_l1(cls, rest: SGD) -> SGD:
        if rest.l1:
            raise ValueError("Muon keeps each filter's norm, so an l1 has nothing to shrink; use sgd")
        return rest


class Adam(Section):
    """Adam (Kingma and Ba, 2015)."""

    name: Literal["adam"] = Field(description="update rule")
    lr: Positive = Field(description="learning rate")
    beta1: Probability = Field(default=0.9, description="decay of the gradient's running mean")
    beta2: Probability = Field(default=0.999, description="decay of the squared gradient's running mean")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty")
    l1: NonNegative = Field(default=0.0, description="L1 penalty on weights; biases and norms carry none")


class AdamW(Section):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    name: Literal["adamw"] = Field(description="update rule")
    lr: Positive = Field(description="learning rate")
    beta1: Probability = Field(default=0.9, description="decay of the gradient's running mean")
    beta2: Probability = Field(default=0.999, description="decay of the squared gradient's running mean")
    weight_decay: NonNegative = Field(default=0.01, description="decoupled weight decay")
    l1: NonNegative = Field(default=0.0, description="L1 penalty on weights; biases and norms carry none")


class Constant(Section):
    """A constant learning rate."""

    name: Literal["constant"] = Field(description="shape of the learning rate over the run")


class Linear(Section):
    """The learning rate rises linearly, holds, and falls linearly."""

    name: Literal["linear"] = Field(description="shape of the learning rate over the run")
    warmup: Fraction = Field(default=0.0, description="rise, as a fraction of all steps")
    hold: Fraction = Field(default=0.0, description="constant phase after it, as a fraction of all steps")
    final: Fraction = Field(default=0.0, description="learning rate at the end, as a fraction of lr")

    @pydantic.field_validator("hold")
    @classmethod
    def _check_room(cls, hold: float, info: pydantic.ValidationInfo) -> float:
        if (warmup := info.data.get("warmup", 0.0)) + hold > 1:
            raise ValueError(f"with a warmup of {warmup} at most {1 - warmup:g} of the steps are left")
        return hold


class Cosine(Section):
    """The learning rate rises linearly and falls along half a cosine."""

    name: Literal["cosine"] = Field(description="shape of the learning rate over the run")
    warmup: Fraction = Field(default=0.0, description="rise, as a fraction of all steps")
    final: Fraction = Field(default=0.0, description="learning rate at the end, as a fraction of lr")


class Step(Section):
    """The learning rate is multiplied by a factor at each milestone."""

    name: Literal["step"] = Field(description="shape of the learning rate over the run")
    milestones: list[Fraction] = Field(description="as fractions of all steps")
    factor: Positive = 0.1


def _name_of(value: Any) -> str:
    """The discriminator of a tagged union: the section's `name`, or '' so that pydantic lists the allowed ones."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return "" if name is None else str(name)


def _one_of(*sections: type[Section]) -> Any:
    """A union of sections, discriminated by `name`."""
    union: Any = None
    for section in sections:
        (name,) = get_args(section.model_fields["name"].annotation)
        tagged = Annotated[section, Tag(name)]  # type: ignore[valid-type]  # a type made at run time
        union = tagged if union is None else union | tagged
    return Annotated[union, Discriminator(_name_of)]


# Beside these, `_target_` names a class of torch.optim or src.models: see `src.configuration.optimizers`.
Optimizer = _one_of(SGD, Muon, Adam, AdamW)

Schedule = _one_of(Constant, Linear, Cosine, Step)

RECORD_KEYS = ("output", "tags", "tracking")  # keys of a configuration on which no result depends

STEPS = "steps"  # the value of a schedule's key that stands for the run's number of optimizer steps


class Build(Section):
    """A section that names, by `_target_`, the class or function that its other keys are given to.

    The other keys are the target's own keyword-only parameters: see `parameters_of`.
    """

    model_config = pydantic.ConfigDict(populate_by_name=True)
    target: str = Field(alias="_target_", description="class or function that the keys beside it are given to")

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Builds it, with what only the caller knows as further arguments."""
        module, _, attribute = self.target.rpartition(".")
        general = type(self).__base__.model_fields  # type: ignore[union-attr]
        own = {key: getattr(self, key) for key in type(self).model_fields if key not in general}
        return getattr(importlib.import_module(module), attribute)(*args, **more, **own)


class Pretrained(Section):
    """A network of a library, by name, and where its weights come from."""

    name: str = Field(description="in the library: a network of timm's, a repository of the model hub, or a folder")
    weights: str = Field(
        default="hub",
        description="hub (the model hub), package (an installed package that carries them), none, or a path of a file "
        "or folder",
    )
    revision: str = Field(default="main", description="of the hub's repository; the hash of a commit pins it")
    sha256: Sha256 | None = Field(
        default=None, description="of the file with the weights as its source has it; null: any content is accepted"
    )


TextTokenizer = Annotated[
    Literal["bpe"] | Pretrained | None,
    Field(description="bpe: subwords learned from the training part; a text encoder: its subwords; null: words"),
]


class FileColumns(Section):
    """Which columns of the manifest hold what."""

    file: str = Field(default="file", description="path of the image, relative to the manifest")
    label: str = Field(default="label", description="name of the class")
    split: str | None = Field(
        default=None, description="train, val or test; empty: train, or drawn where a split has no row; null: drawn"
    )
    group: str | None = Field(
        default=None,
        description="images of equal value come into the same split, e.g. photos of one person; null: none",
    )


class TextColumns(Section):
    """Which columns of a table hold what: by name, or by number, from 0, in files without a header."""

    text: str | NonNegativeInt | list[str | NonNegativeInt] = Field(
        default="text", description="the text; several are joined by a blank"
    )
    label: str | NonNegativeInt = Field(default="label", description="name of the class")
    split: str | NonNegativeInt | None = Field(
        default=None,
        description="train, val or test; empty: train, or drawn where a split has no row; null: as the files are named",
    )
    group: str | NonNegativeInt | None = Field(
        default=None, description="rows of equal value come into the same split, e.g. texts of one author; null: none"
    )

    @property
    def texts(self) -> list[str]:
        """The names of the columns that make up the text."""
        return [str(column) for column in (self.text if isinstance(self.text, list) else [self.text])]

    @property
    def has_header(self) -> bool:
        return isinstance(self.label, str)


ManifestColumns = Annotated[
    FileColumns | None, Field(description="of the manifest: which holds what; null: `file` and `label`")
]

TableColumns = Annotated[
    TextColumns | None, Field(description="of the tables: which holds what; null: `text` and `label`")
]

# YAML reads yes and no as booleans.
Resident = Annotated[
    Literal["auto", "yes", "no"],
    BeforeValidator(lambda value: {True: "yes", False: "no"}[value] if isinstance(value, bool) else value),
]


class Loader(Section):
    """How batches are made, whatever the kind of data; src/data/kinds/ adds what a kind has besides."""

    batch_size: PositiveInt = Field(description="examples per training step, of all processes together")
    eval_batch_size: PositiveInt | None = Field(
        default=None,
        description="examples per batch in validation and evaluation; null: 500, fewer of images of more than 64x64",
    )
    resident: Resident = Field(
        default="auto",
        description="yes: a split lies in the GPU's memory; no: the rows of each batch are read ahead from its file; "
        "auto: yes for at most half of the free memory. On a CPU batches come straight from the mapped file with yes, "
        "and with auto if it has at most 1 GiB",
    )


class Official(Section):
    """The official source of a data set: an archive, or a folder of files."""

    urls: list[str] = Field(min_length=1, description="mirrors of the archive or of the folder, tried in order")
    files: dict[str, Sha256] | None = Field(
        default=None, description="sha256 of each file of the folder; null: an archive"
    )
    sha256: Sha256 | None = Field(
        default=None, description="of the archive; null: none is published, any content is accepted"
    )


class PackingRay(Section):
    """Packing on a Ray cluster, at the address in RAY_ADDRESS."""

    processes: PositiveInt = Field(description="tasks that decode image files at the same time")
    cpus: PositiveInt = Field(default=1, description="of each task, which are its threads")


class Data(Build):
    """A data set: its source, how it is packed, how it is batched."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="name of its folder in data/")
    official: Official | None = Field(default=None, description="null: data.archive is needed")
    archive: str | None = Field(
        default=None,
        description="path or URL of an archive or folder of your own, used in place of the official source",
    )
    sha256: Sha256 | None = Field(default=None, description="of data.archive; null: any content is accepted")
    loader: Loader | None = None
    ray: PackingRay | None = Field(
        default=None, description="image files are decoded on a Ray cluster, in so many tasks; null: on this machine"
    )


class CallbackConfig(Build):
    """A callback of Lightning's or of this project; the other keys are its constructor's arguments."""

    model_config = pydantic.ConfigDict(extra="allow")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        check_callback(self.target, self.model_extra or {})
        return self

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Builds it."""
        return super().__call__(*args, **more, **(self.model_extra or {}))


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
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    cuda_graphs: bool = Field(
        default=False, description="launch each training step as one CUDA graph; not for texts, nor with DDP"
    )
    threads: PositiveInt | None = Field(
        default=None,
        description="CPU threads per process; null: all cores, or a container's quota; another number gives other bits",
    )
    deterministic: bool = Field(default=True, description="use deterministic algorithms only")
    benchmark: bool = Field(
        default=False, description="let cuDNN measure its algorithms and take the fastest; on a GPU, not deterministic"
    )
    max_epochs: PositiveInt = Field(description="epochs of training")
    max_time: Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d:\d\d$")] | None = Field(
        default=None, description="DAYS:HH:MM:SS of training, after which the run ends and keeps its result; null: none"
    )
    accumulate_grad_batches: PositiveInt = Field(
        default=1, description="batches whose gradients make one optimizer step; not for GANs, nor with cuda_graphs"
    )
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
    monitor: str = Field(description="metric of the task that keep=best and early_stopping compare, e.g. val_accuracy")
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
    callbacks: dict[str, CallbackConfig] = Field(
        default={}, description="further callbacks, NAME: {_target_: pytorch_lightning.callbacks.CLASS, ...}"
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
        """Threads of each process: `threads`, or its share of the cores; None leaves it to torch."""
        return self.threads if self.threads or self.devices == 1 else max(1, cores() // self.devices)


class Evaluation(Section):
    """What evaluate measures and shows: the options of the model's task, in src/tasks/."""


class Export(Section):
    """The exported model: format, tolerance, and how its latency is measured."""

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
        excluded = ("official", "archive", "sha256", "loader", "ray")
        return {"profile": self.profile.name} | {k: v for k, v in plain(self.data).items() if k not in excluded}

    @property
    def raw(self) -> Path:
        """The folder of the raw archive."""
        return ROOT / (self.archive_folder or self.data_folder) / "raw" / self.profile.name / self.data.name

    @property
    def processed(self) -> Path:
        """The folder of the packed splits."""
        return ROOT / self.data_folder / "processed" / self.profile.name / self.data.name

    @property
    def report(self) -> Path:
        """The folder of the data report that DVC's stage writes."""
        return ROOT / "data" / "reports" / self.data.name

    @property
    def direct_report(self) -> Path:
        """The folder of the data report that `python -m src.describe DATA` writes."""
        return ROOT / "data" / "direct" / "reports" / self.profile.name / self.data.name


class Config(DataConfig):
    """A complete, checked configuration."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        description="name of the experiment, of its output folder and of its MLflow experiment"
    )
    description: str = Field(default="", description="a sentence for the model card and for MLflow")
    init_from: str | None = Field(
        default=None,
        description="an earlier run whose weights training begins with: its id in MLflow, or its folder; null: none",
    )
    weights_folder: str | None = Field(
        default=None, description="folder of the weights that training begins with; null: weights/ in output"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(description="seed of weights, order, augmentation and dropout")
    model: Build
    trainer: Trainer
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    output: str = Field(description="folder of the run, relative to the repository")
    tags: dict[str, str | int | float | bool] = Field(
        default={}, description="tags of the run in MLflow, e.g. +tags.purpose=baseline; they change no result"
    )
    tracking: bool = Field(default=True, description="record the run in MLflow; debug=... sets it to false")

    @property
    def folder(self) -> Path:
        """The folder that this run's stages write to."""
        return ROOT / self.output

    @property
    def start(self) -> Path:
        """The folder of the weights that training begins with."""
        return ROOT / (self.weights_folder or f"{self.output}/weights")

    @property
    def pretrained(self) -> Pretrained | None:
        """The section of the model that names a pretrained network, if it has one."""
        return next((value for _, value in self.model if isinstance(value, Pretrained)), None)

    @property
    def label(self) -> str:
        """A title for pictures: experiment, profile, seed."""
        return f"{self.name} · {self.profile.name} · seed {self.seed}"

    @property
    def run_name(self) -> str:
        """The name of the run in MLflow."""
        return f"seed {self.seed} {self.profile.name}"

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
        """The configuration as nested dicts."""
        return plain(self)

    def record(self) -> dict[str, Any]:
        """The configuration as it is written and sent, for YAML and MLflow: credentials in addresses are masked."""
        masked: dict[str, Any] = masked_values(self.plain())
        return masked

    def settings(self) -> dict[str, Any]:
        """The record without the keys that say where and how a run is kept, on which no result depends."""
        return {key: value for key, value in self.record().items() if key not in RECORD_KEYS}


def plain(value: Any) -> Any:
    """A section as nested dicts, lists and scalars."""
    if isinstance(value, pydantic.BaseModel):
        fields = {key: getattr(value, key) for key in type(value).model_fields}
        names = {key: field.alias or key for key, field in type(value).model_fields.items()}
        return {names.get(k, k): plain(v) for k, v in (fields | (value.model_extra or {})).items()}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
