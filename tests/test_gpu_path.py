"""The GPU path without a GPU: training on torch's `meta` device.

It has shapes, dtypes and layouts but no values, so it refuses operations that synchronise with a GPU (`item`, `tolist`,
a mask as index) and, as a GPU does, tensors of the CPU. Code that runs there runs on a GPU without synchronisation.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.common.errors import ConfigError
from src.common.hardware import device_of
from src.common.signals import Interruption
from src.configuration.composing import compose
from src.configuration.schema import Config
from src.data import kinds
from src.data.batching import Batches
from src.data.kinds.images import ImageBatches
from src.data.kinds.pairs import PairBatches
from src.data.kinds.text import TextBatches
from src.data.kinds.unpaired import UnpairedBatches, UnpairedLoader
from src.models.adversarial import scaled
from src.models.classifier import Classifier, ImageClassifier
from src.sweeping import worker
from src.training import determinism
from src.training.determinism import RandomStatePerBatch
from src.training.history import History
from src.training.trainer import adapt, build_trainer, require_gpus, uses_bf16
from tests.conftest import Run

META = torch.device("meta")
IMAGES = {
    "images": torch.zeros(24, 3, 16, 16, dtype=torch.uint8),
    "labels": torch.arange(24) % 3,
}
LENGTHS = torch.arange(24) % 7 + 1
TEXTS = {
    "tokens": torch.zeros(int(LENGTHS.sum()), dtype=torch.int32),
    "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]),
    "labels": torch.arange(24) % 2,
}
PAIRS = {key: torch.zeros(24, 3, 32, 32, dtype=torch.uint8) for key in ("input", "target")}
CLASSES = ["a", "b", "c"]
METAS: dict[str, dict[str, Any]] = {
    "cifar10_resnet": {"kind": "images", "shape": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "classes": CLASSES},
    "imdb_lstm": {"kind": "text", "vocabulary": ["<unk>", "<pad>", "word"], "classes": CLASSES[:2]},
    "facades_pix2pix": {"kind": "pairs", "shape": [3, 32, 32]},
}
UNPAIRED = {"kind": "unpaired", "shape": [3, 32, 32]}
BATCHES: dict[str, tuple[type[Batches], dict[str, Tensor]]] = {
    "cifar10_resnet": (ImageBatches, IMAGES),
    "imdb_lstm": (TextBatches, TEXTS),
    "facades_pix2pix": (PairBatches, PAIRS),
}
NARROW = {
    "cifar10_resnet": "model.network.width=8",
    "imdb_lstm": "model.hidden=8",
    "facades_pix2pix": "model.width=4",
}
AUGMENTED = [
    ("cifar10_resnet", {"flip": "alternating", "crop_padding": 2}),
    ("cifar10_resnet", {"flip": "random", "crop_padding": 2}),
    ("cifar10_resnet", {}),
    ("imdb_lstm", {"word_dropout": 0.3, "max_tokens": 5}),
    ("imdb_lstm", {}),
    ("facades_pix2pix", {"flip": "random", "enlarge": 1.25}),
    ("facades_pix2pix", {}),
]


class NoSynchronisation(TorchDispatchMode):
    """Refuses operations across two devices, and blocking copies between devices."""

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.dim()]
        if len({tensor.device.type for tensor in tensors}) > 1:
            assert func in self.COPIES, f"{func} across two devices"
            assert (kwargs or {}).get("non_blocking") or True in args[2:], f"{func} blocks"
        return result


class NoHiddenCopies(TorchFunctionMode):
    """Refuses functions that create values on the CPU and copy them to the device."""

    CONSTRUCTORS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in self.CONSTRUCTORS or result.device != META, f"{func.__name__} blocks"
        return result


class StepGuard(pl.Callback):
    """Applies both guards to every batch of training and validation, and counts the batches."""

    def __init__(self) -> None:
        self.guards = ExitStack()
        self.batches = 0

    def _open(self, *_: Any) -> None:
        self.guards.enter_context(NoHiddenCopies())
        self.guards.enter_context(NoSynchronisation())
        self.batches += 1

    def _close(self, *_: Any) -> None:
        self.guards.close()

    on_train_batch_start = on_validation_batch_start = _open  # type: ignore[assignment]  # any arguments
    on_train_batch_end = on_validation_batch_end = on_exception = _close  # type: ignore[assignment]


@contextmanager
def fake_cuda_autocast() -> Iterator[None]:
    """Equals `torch.autocast("cuda", torch.bfloat16)`, which needs a GPU. cuDNN is off: its LSTM needs a driver."""
    with torch.backends.cudnn.flags(enabled=False):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


class MetaDeviceStrategy(SingleDeviceStrategy):
    """Trains on the meta device; sums over processes, where synchronisation is allowed, become ones."""

    class Accelerator(CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            assert device == META

    def __init__(self) -> None:
        super().__init__(META, accelerator=self.Accelerator())

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def teardown(self) -> None:
        """No-op: there are no weights to move to the CPU."""


def gpu_config(experiment: str, *overrides: str) -> Config:
    return compose([f"experiment={experiment}", "trainer=gpu", "output=out", NARROW[experiment], *overrides])


def batches_on_device(experiment: str, *, train: bool, **loader: Any) -> Batches:
    batches, split = BATCHES[experiment]
    options = kinds.load(METAS[experiment]["kind"]).options(**{"batch_size": 8, "eval_batch_size": 10} | loader)
    return batches(split, METAS[experiment], options, train=train).to(META)


# --- data on the device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("experiment", "loader"), AUGMENTED)
def test_batches_are_made_on_the_device_without_synchronisation(
    experiment: str, loader: dict[str, Any], train: bool
) -> None:
    on_device = batches_on_device(experiment, train=train, **loader)
    kind, split = BATCHES[experiment]
    on_cpu = kind(split, METAS[experiment], on_device.loader, train=train)
    for epoch in range(2):
        on_device.set_epoch(epoch)
        on_cpu.set_epoch(epoch)
        with NoSynchronisation(), NoHiddenCopies():
            batches = list(on_device)
        assert {tensor.device for batch in batches for tensor in batch} == {META}
        expected = [[(tensor.shape, tensor.dtype) for tensor in batch] for batch in on_cpu]
        assert [[(tensor.shape, tensor.dtype) for tensor in batch] for batch in batches] == expected


def test_domains_are_cropped_on_the_device_without_synchronisation() -> None:
    split = {name: torch.zeros(count, 3, 36, 36, dtype=torch.uint8) for name, count in (("a", 9), ("b", 12))}
    loader = UnpairedLoader(batch_size=4, eval_batch_size=4, flip="random")
    for train in (True, False):
        batches = UnpairedBatches(split, UNPAIRED, loader, train=train).to(META)
        with NoSynchronisation(), NoHiddenCopies():
            shapes = [tuple(image.shape[1:]) for batch in batches for image in batch]
        assert set(shapes) == {(3, 32, 32)}


def test_all_large_tensors_are_on_the_device() -> None:
    for experiment, (_, split) in BATCHES.items():
        batches = batches_on_device(experiment, train=True)
        assert {key for key, tensor in batches.split.items() if tensor.device == META} == split.keys() - {"offsets"}


def test_the_guards_refuse_operations_that_synchronise() -> None:
    """Otherwise the other tests of this file prove nothing."""
    values = torch.zeros(4, device=META)
    operations: list[Callable[[], Any]] = [
        lambda: values.sum().item(),
        lambda: values.tolist(),
        lambda: bool(values.sum() > 0),
        lambda: values[values > 0],
        lambda: values + torch.zeros(4),
        lambda: values[torch.tensor([1, 2])],
        lambda: torch.zeros(4).to(META),
        lambda: values.new_tensor(3),
    ]
    for operation in operations:
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), NoSynchronisation(), NoHiddenCopies():
            operation()


# --- training on the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["trainer.log_every=50", "trainer.gradient_clip=1.0"])
@pytest.mark.parametrize("experiment", BATCHES)
def test_a_training_step_never_synchronises(
    experiment: str, override: str, monkeypatch: pytest.MonkeyPatch, restore_deterministic_mode: None
) -> None:
    """Lightning's loop over two epochs: forward, loss, backward, clipping, optimizer, sums, validation."""
    config = gpu_config(experiment, override, "model.label_smoothing=0.1" if "pix2pix" not in experiment else "seed=0")
    model = config.model(METAS[experiment])
    clip = config.trainer.gradient_clip
    if not model.automatic_optimization:
        model.gradient_clip = clip
    # Logging reads values, every log_every batches and at the end of an epoch: synchronisation is allowed there.
    logged = set()
    monkeypatch.setattr(model, "log", lambda name, *_, **__: logged.add(name.partition("_")[0]))
    guard = StepGuard()
    trainer = pl.Trainer(
        strategy=MetaDeviceStrategy(),
        max_epochs=2,
        num_sanity_val_steps=0,
        gradient_clip_val=clip if model.automatic_optimization else None,
        use_distributed_sampler=False,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomStatePerBatch(0), guard],
    )
    trainer.fit(model, batches_on_device(experiment, train=True), batches_on_device(experiment, train=False))
    assert guard.batches == 2 * (3 + 3)  # two epochs of three training and three validation batches
    assert logged == {"loss", "lr", "train", "val"}
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {META}
    assert trainer.global_step == 2 * 3 * len(trainer.optimizers)


# --- precision, compilation, determinism ------------------------------------------------------------------------------


def test_trainer_gpu_sets_the_device_bf16_and_compilation() -> None:
    for experiment in BATCHES:
        trainer = gpu_config(experiment).trainer
        assert (trainer.accelerator, trainer.precision) == ("gpu", "bf16")
        assert (trainer.compile, trainer.cuda_graphs) == (False, True)
        assert trainer.deterministic is True
        assert device_of(trainer.accelerator) == torch.device("cuda")
        assert uses_bf16(trainer)
        assert not uses_bf16(gpu_config(experiment, "trainer.precision=32").trainer)
        assert trainer.max_epochs == compose([f"experiment={experiment}", "output=out"]).trainer.max_epochs


def test_on_a_gpu_lightning_has_the_configured_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restore_deterministic_mode: None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = gpu_config("cifar10_resnet")
    require_gpus(config.trainer)
    model = config.model(METAS["cifar10_resnet"])
    trainer = build_trainer(config, model, History(lambda *_: None, prints_lines=False), tmp_path, Interruption())
    precision = trainer.precision_plugin
    assert isinstance(precision, MixedPrecision)
    assert (precision.precision, precision.device, precision.scaler) == ("bf16-mixed", "cuda", None)
    assert trainer.strategy.root_device == torch.device("cuda:0")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("override", ["trainer=gpu", "trainer=gpu trainer.devices=2 trainer.strategy=ddp"])
def test_a_missing_gpu_is_refused_with_the_remedy(override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^trainer\.devices: \d on 'gpu', but .* 0 CUDA devices here; use trainer=cpu$"
    ):
        require_gpus(gpu_config("cifar10_resnet", *override.split()).trainer)
    require_gpus(compose(["experiment=cifar10_resnet", "trainer=ddp", "output=out"]).trainer)  # falls back to the CPU


def test_more_gpus_than_there_are_are_refused_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"1 CUDA devices here; use trainer=cpu or trainer\.devices=1$"):
        require_gpus(gpu_config("cifar10_resnet", "trainer.devices=2").trainer)


@pytest.mark.parametrize(
    ("visible", "gpus"), [(None, ["0", "1", "2", "0"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b", "GPU-c", "GPU-a"])]
)
def test_each_worker_of_a_sweep_has_a_gpu_of_its_own(
    visible: str | None, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    processes: list[Any] = []

    def process(**options: Any) -> Any:
        processes.append(options)
        return SimpleNamespace(start=int)

    context = SimpleNamespace(Pipe=lambda: [SimpleNamespace(close=int)] * 2, Process=process)
    monkeypatch.setattr("multiprocessing.get_context", lambda method: context)
    for number in range(4):
        worker.Worker(gpu_config("imdb_lstm").trainer, number)
    seen = []
    for options in processes:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        worker.use_gpu(options["args"][1])
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == gpus
    worker.Worker(gpu_config("imdb_lstm", "trainer.devices=2", "trainer.strategy=ddp").trainer, 0)
    assert processes[-1]["args"][1] is None  # a trial has several GPUs


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_on_a_missing_gpu_writes_nothing(clone: Path, run: Run) -> None:
    def files() -> set[Path]:
        """All files but those of git, of Python's cache, and of Hydra, which writes before it calls the stage."""
        return {
            path
            for path in clone.rglob("*")
            if path.is_file() and not {"__pycache__", ".git", ".hydra"} & {*path.parts}
        }

    before = files()
    done = run("python", "-m", "src.train", "+experiment=imdb_lstm", "trainer=gpu", "seed=77", check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "use trainer=cpu" in done.stderr
    assert files() == before


@pytest.mark.parametrize("experiment", BATCHES)
def test_compilation_and_layout_keep_the_keys_of_the_state_dict(experiment: str) -> None:
    config = gpu_config(experiment, "trainer.compile=true")
    model = config.model(METAS[experiment])
    keys = list(model.state_dict())
    adapt(model, config.trainer)
    assert list(model.state_dict()) == keys
    is_compiled = [part._compiled_call_impl is not None for part in model.children()]
    assert is_compiled == [experiment != "imdb_lstm"] * len(is_compiled)  # texts differ in length
    filters = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)


@pytest.mark.parametrize("experiment", BATCHES)
def test_on_a_gpu_networks_compute_in_bf16_and_losses_in_fp32(experiment: str) -> None:
    """With fake CUDA tensors, which have no values and to which a GPU's autocast applies."""
    model = gpu_config(experiment).model(METAS[experiment])
    batches, split = BATCHES[experiment]
    options = kinds.load(METAS[experiment]["kind"]).options(batch_size=8)
    batch = next(iter(batches(split, METAS[experiment], options, train=True)))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, fake_cuda_autocast():
        model.to("cuda")
        inputs = [fake.from_tensor(tensor).to("cuda") for tensor in batch]
        if isinstance(model, Classifier):
            output_layer: Any = model.network.classify if isinstance(model, ImageClassifier) else model.classify
            dtypes: list[torch.dtype] = []
            output_layer.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
            model(*inputs[:-1])
            assert dtypes == [torch.bfloat16]
            losses = [model.loss(tuple(inputs), "train", 0.1)]
        else:
            assert model(inputs[0]).dtype == torch.bfloat16
            source, drawn = (scaled(side, torch.float32) for side in inputs)
            losses = [model.judged(model.discriminator(source, drawn), real) for real in (True, False)]
    assert {(loss.dtype, loss.device.type) for loss in losses} == {(torch.float32, "cuda")}


def test_cublas_is_set_to_deterministic_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    importlib.reload(determinism)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # one of the two values that torch accepts
    assert not torch.cuda.is_initialized()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    importlib.reload(determinism)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's value is kept


def test_32_bit_precision_does_not_use_tf32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    determinism.fix(0, None)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
