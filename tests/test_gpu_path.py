"""The GPU's path as far as a CPU can try it, on a stand-in: torch's `meta` device.

It has shapes, types and layouts but no values, so it refuses what a GPU would have to be waited for (`item`, `tolist`,
a mask as index), and it takes tensors of the CPU no more than a GPU does. What runs there runs on a GPU without a stop.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
from src.common.signals import Interruption
from src.configuration.composing import compose
from src.configuration.schema import Config
from src.data import kinds
from src.data.batching import Batches
from src.data.kinds.images import ImageBatches
from src.data.kinds.pairs import PairBatches
from src.data.kinds.text import TextBatches
from src.models.adversarial import scaled
from src.models.classifier import Classifier, ImageClassifier
from src.training import determinism
from src.training.determinism import RandomStatePerBatch
from src.training.history import History
from src.training.trainer import adapt, build_trainer, device_of, require_gpus, uses_bf16
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
META_OF: dict[str, dict[str, Any]] = {
    "cifar10_resnet": {"kind": "images", "shape": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "classes": CLASSES},
    "imdb_lstm": {"kind": "text", "vocabulary": ["<unk>", "<pad>", "word"], "classes": CLASSES[:2]},
    "facades_pix2pix": {"kind": "pairs", "shape": [3, 32, 32]},
}
KIND: dict[str, tuple[type[Batches], dict[str, Tensor]]] = {
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


class NoWaiting(TorchDispatchMode):
    """Refuses operations over two devices, and copies between devices that hold up the host."""

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        met = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.dim()]
        if len({tensor.device.type for tensor in met}) > 1:
            assert func in self.COPIES, f"{func} over two devices"
            assert (kwargs or {}).get("non_blocking") or True in args[2:], f"{func} waits for the device"
        return result


class NoHiddenCopies(TorchFunctionMode):
    """Refuses values that are made on the CPU and copied to the device under the hood."""

    MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in self.MAKERS or result.device != META, f"{func.__name__} waits for the device"
        return result


class WatchedSteps(pl.Callback):
    """Watches each batch of training and validation."""

    def __init__(self) -> None:
        self.watch = ExitStack()
        self.watched = 0

    def _open(self, *_: Any) -> None:
        self.watch.enter_context(NoHiddenCopies())
        self.watch.enter_context(NoWaiting())
        self.watched += 1

    def _close(self, *_: Any) -> None:
        self.watch.close()

    on_train_batch_start = on_validation_batch_start = _open  # type: ignore[assignment]  # any arguments
    on_train_batch_end = on_validation_batch_end = on_exception = _close  # type: ignore[assignment]


@contextmanager
def fake_cuda_autocast() -> Iterator[None]:
    """What `torch.autocast("cuda", torch.bfloat16)` does, which declines without a GPU. cuDNN's LSTM needs a driver."""
    with torch.backends.cudnn.flags(enabled=False):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


class StandIn(SingleDeviceStrategy):
    """Lets Lightning train on the stand-in. What is summed over processes, where waiting is in place, becomes ones."""

    class Accelerator(CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            assert device == META

    def __init__(self) -> None:
        super().__init__(META, accelerator=self.Accelerator())

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def teardown(self) -> None:
        """The weights stay: there are none to bring back."""


def composed(experiment: str, *overrides: str) -> Config:
    return compose([f"experiment={experiment}", "trainer=gpu", "output=out", NARROW[experiment], *overrides])


def resident(experiment: str, *, train: bool, **loader: Any) -> Batches:
    kind, split = KIND[experiment]
    options = kinds.load(META_OF[experiment]["kind"]).options(**{"batch_size": 8, "eval_batch_size": 10} | loader)
    return kind(split, META_OF[experiment], options, train=train).to(META)


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts back what a trainer sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


# --- data that live on the device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("experiment", "loader"), AUGMENTED)
def test_batches_are_made_on_the_device_without_waiting_for_it(
    experiment: str, loader: dict[str, Any], train: bool
) -> None:
    made = resident(experiment, train=train, **loader)
    there = KIND[experiment][0](KIND[experiment][1], META_OF[experiment], made.loader, train=train)
    for epoch in range(2):
        made.set_epoch(epoch)
        there.set_epoch(epoch)
        with NoWaiting(), NoHiddenCopies():
            batches = list(made)
        assert {tensor.device for batch in batches for tensor in batch} == {META}
        on_cpu = [[(tensor.shape, tensor.dtype) for tensor in batch] for batch in there]
        assert [[(tensor.shape, tensor.dtype) for tensor in batch] for batch in batches] == on_cpu


def test_all_that_is_large_lives_on_the_device() -> None:
    for experiment, (_, split) in KIND.items():
        made = resident(experiment, train=True)
        assert {key for key, tensor in made.split.items() if tensor.device == META} == split.keys() - {"offsets"}


def test_the_stand_in_refuses_what_a_gpu_would_be_waited_for() -> None:
    """So that the tests beside it mean something."""
    values = torch.zeros(4, device=META)
    waits: list[Callable[[], Any]] = [
        lambda: values.sum().item(),
        lambda: values.tolist(),
        lambda: bool(values.sum() > 0),
        lambda: values[values > 0],
        lambda: values + torch.zeros(4),
        lambda: values[torch.tensor([1, 2])],
        lambda: torch.zeros(4).to(META),
        lambda: values.new_tensor(3),
    ]
    for wait in waits:
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), NoWaiting(), NoHiddenCopies():
            wait()


# --- training on the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["trainer.log_every=50", "trainer.gradient_clip=1.0"])
@pytest.mark.parametrize("experiment", KIND)
def test_a_step_never_waits_for_the_device(
    experiment: str, override: str, monkeypatch: pytest.MonkeyPatch, settings: None
) -> None:
    """The whole of Lightning's loop over two epochs: forward, loss, backward, clipping, optimizer, sums, validation."""
    config = composed(experiment, override, "model.label_smoothing=0.1" if "pix2pix" not in experiment else "seed=0")
    model = config.model(META_OF[experiment])
    clip = config.trainer.gradient_clip
    if not model.automatic_optimization:
        model.gradient_clip = clip
    # Lightning reads what is logged: one loss in log_every, and sums at an epoch's end. Waiting is in place there.
    logged = set()
    monkeypatch.setattr(model, "log", lambda name, *_, **__: logged.add(name.partition("_")[0]))
    watched = WatchedSteps()
    trainer = pl.Trainer(
        strategy=StandIn(),
        max_epochs=2,
        num_sanity_val_steps=0,
        gradient_clip_val=clip if model.automatic_optimization else None,
        use_distributed_sampler=False,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomStatePerBatch(0), watched],
    )
    trainer.fit(model, resident(experiment, train=True), resident(experiment, train=False))
    assert watched.watched == 2 * (3 + 3)  # epochs, of training and of validation
    assert logged == {"loss", "lr", "train", "val"}
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {META}
    assert trainer.global_step == 2 * 3 * len(trainer.optimizers)


# --- precision, compilation, determinism ------------------------------------------------------------------------------


def test_trainer_gpu_chooses_the_device_bf16_and_compilation() -> None:
    for experiment in KIND:
        config = composed(experiment)
        asked = config.trainer
        assert (asked.accelerator, asked.precision, asked.compile, asked.deterministic) == ("gpu", "bf16", True, True)
        assert device_of(asked) == torch.device("cuda")
        assert uses_bf16(asked)
        assert not uses_bf16(composed(experiment, "trainer.precision=32").trainer)
        assert asked.max_epochs == compose([f"experiment={experiment}", "output=out"]).trainer.max_epochs


def test_on_a_gpu_lightning_is_given_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = composed("cifar10_resnet")
    require_gpus(config.trainer)
    model = config.model(META_OF["cifar10_resnet"])
    trainer = build_trainer(config, model, History(lambda *_: None, prints_lines=False), tmp_path, Interruption())
    precision = trainer.precision_plugin
    assert isinstance(precision, MixedPrecision)
    assert (precision.precision, precision.device, precision.scaler) == ("bf16-mixed", "cuda", None)
    assert trainer.strategy.root_device == torch.device("cuda:0")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("override", ["trainer=gpu", "trainer=gpu trainer.devices=2 trainer.strategy=ddp"])
def test_a_gpu_that_is_not_there_is_refused_with_the_remedy(override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^trainer\.devices: \d on 'gpu', but .* 0 CUDA devices here; use trainer=cpu$"
    ):
        require_gpus(composed("cifar10_resnet", *override.split()).trainer)
    require_gpus(compose(["experiment=cifar10_resnet", "trainer=ddp", "output=out"]).trainer)  # falls back on the CPU


def test_two_gpus_where_there_is_one_are_refused_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"1 CUDA devices here; use trainer=cpu or trainer\.devices=1$"):
        require_gpus(composed("cifar10_resnet", "trainer.devices=2").trainer)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_on_a_missing_gpu_writes_nothing(clone: Path, run: Run) -> None:
    def files() -> set[Path]:
        """All but git's, Python's, and what Hydra notes about the command before it calls the stage."""
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


@pytest.mark.parametrize("experiment", KIND)
def test_compilation_and_layout_leave_the_state_dicts_keys(experiment: str) -> None:
    config = composed(experiment)
    model = config.model(META_OF[experiment])
    keys = list(model.state_dict())
    adapt(model, config.trainer)
    assert list(model.state_dict()) == keys
    assert all(part._compiled_call_impl is not None for part in model.children())
    filters = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)


@pytest.mark.parametrize("experiment", KIND)
def test_on_a_gpu_networks_compute_in_bf16_and_losses_in_fp32(experiment: str) -> None:
    """Of tensors without values that call themselves CUDA's, so that a GPU's autocast applies to them."""
    model = composed(experiment).model(META_OF[experiment])
    kind, split = KIND[experiment]
    options = kinds.load(META_OF[experiment]["kind"]).options(batch_size=8)
    batch = next(iter(kind(split, META_OF[experiment], options, train=True)))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, fake_cuda_autocast():
        model.to("cuda")
        given = [fake.from_tensor(tensor).to("cuda") for tensor in batch]
        if isinstance(model, Classifier):
            last: Any = model.network.classify if isinstance(model, ImageClassifier) else model.classify
            answers: list[torch.dtype] = []
            last.register_forward_hook(lambda _, given, answer: answers.append(answer.dtype))
            model(*given[:-1])
            assert answers == [torch.bfloat16]
            losses = [model.loss(tuple(given), "train", 0.1)]
        else:
            assert model(given[0]).dtype == torch.bfloat16
            source, drawn = (scaled(side, torch.float32) for side in given)
            losses = [model.judged(model.discriminator(source, drawn), real) for real in (True, False)]
    assert {(loss.dtype, loss.device.type) for loss in losses} == {(torch.float32, "cuda")}


def test_cublas_is_told_to_be_deterministic_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    importlib.reload(determinism)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # one of the two that torch accepts
    assert not torch.cuda.is_initialized()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    importlib.reload(determinism)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own


def test_32_bit_are_32_bit_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    determinism.fix(0, None)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
