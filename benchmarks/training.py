"""Training: `trainer.fit` against a hand-written loop, ordinary code, and the peak of matrix products."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, stock
from benchmarks.setting import Setting
from benchmarks.table import Figure, at_most
from benchmarks.timing import Measure, StepClock, paired
from src.common.hardware import device_of, keep_freed_memory
from src.common.signals import Interruption
from src.configuration.schema import Config
from src.data import kinds, packed
from src.data.batching import Batches
from src.data.datamodule import PackedData
from src.models.adversarial import scaled
from src.models.base import Model
from src.models.cpu import Convolution
from src.models.cyclegan import CycleGAN
from src.models.pix2pix import Pix2Pix
from src.training import determinism
from src.training.history import History
from src.training.trainer import adapt, build_trainer, step_graphs, uses_bf16

LOOP_OVERHEAD = at_most(1.05)
BATCH_SHARE = at_most(2.0)  # percent of a step
STOCK_ROUNDS = 2  # the stock loops are several times slower
Step = Callable[[tuple[Tensor, ...]], None]


def measure(setting: Setting) -> list[Figure]:
    """Each experiment with its configuration: `trainer.fit`, a hand-written loop and the stock loop, in turn."""
    keep_freed_memory()
    return [figure for name in setting.experiments for figure in measure_one(name, setting)]


def measure_one(name: str, setting: Setting) -> list[Figure]:
    """The figures of one experiment."""
    config = setting.prepare(name)
    determinism.fix(config.seed, config.trainer.threads)
    loops = Loops(config, setting.folder / name / "work")
    steps = loops.steps_in(setting.seconds)
    gemm = machine.gemm(torch.bfloat16 if uses_bf16(config.trainer) else torch.float32, loops.device)
    candidates: dict[str, Measure] = {
        "fit": partial(loops.fit, steps),
        "hand": partial(loops.hand_written, steps),
        "gemm": gemm,
    }
    with_hand = paired(candidates, setting.rounds)
    stock_steps = max(3, min(steps, round(setting.seconds / loops.stock(2))))
    with_stock = paired(
        {"fit": candidates["fit"], "stock": partial(loops.stock, stock_steps)}, min(STOCK_ROUNDS, setting.rounds)
    )

    size = config.loader.batch_size
    label = f"training {name}"

    def rate(seconds: float) -> float:
        return size / seconds

    step_flops = loops.flops(steps)
    return [
        Figure(label, "trainer.fit", with_hand.spread("fit", rate), "examples/s"),
        Figure(label, "hand-written loop", with_hand.spread("hand", rate), "examples/s"),
        Figure(label, "stock code", with_stock.spread("stock", rate), "examples/s"),
        Figure(label, "time of trainer.fit / hand-written loop", with_hand.ratio("fit", "hand"), "", LOOP_OVERHEAD),
        Figure(label, "speed of trainer.fit / stock code", with_stock.ratio("stock", "fit"), "x"),
        Figure.single(label, "time for batches", 100 * loops.batch_share, "% of a step", BATCH_SHARE),
        Figure(label, "share of the matrix-product peak", with_hand.ratio("gemm", "fit", 100 * step_flops), "%"),
    ]


class Loops:
    """One experiment's training loops over the same model, each returning seconds per step.

    Every turn trains on the first batches of epoch 0, so that the same work is timed each time, on images at full size,
    as in the stock loop. `trainer.fit` runs with the callbacks of `src.train`, without validation, which is not part of
    a step, and without MLflow, which gets every 50th step.
    """

    def __init__(self, config: Config, work: Path) -> None:
        loader = config.loader.model_copy(update={"low_resolution": None})
        self.config = config = config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})
        self.work = work
        self.device = device_of(config.trainer.accelerator)
        self.meta = packed.read_meta(config.processed)
        self.split = packed.read_split(config.processed, "train")
        self.model: Model = config.model(self.meta)
        self.model.prepare(self.split)
        adapt(self.model, config.trainer)
        self.batch_share = 0.0  # time for batches, as a fraction of the last hand-written loop

    def batches(self) -> Batches:
        """The training batches of epoch 0, on the device."""
        kind = kinds.load(self.meta["kind"]).batches
        return kind(self.split, self.meta, self.config.loader, train=True, seed=self.config.seed).to(self.device)

    def steps_in(self, seconds: float) -> int:
        """The number of steps that take about `seconds`: at least 4, at most an epoch."""
        epoch = len(self.batches())
        probe = self.hand_written(min(4, epoch))
        return max(min(4, epoch), min(epoch, round(seconds / probe)))

    def fit(self, steps: int, *callbacks: pl.Callback) -> float:
        """Seconds per step of `trainer.fit`, as `src.train` calls it, with further callbacks."""
        clock = StepClock(steps)
        limits = {
            "max_epochs": 1,
            "limit_train_batches": steps,
            "limit_val_batches": 0,
            "keep": "last",
            "early_stopping": None,
        }
        config = self.config.model_copy(update={"trainer": self.config.trainer.model_copy(update=limits)})
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):  # no bar
            history = History(lambda metrics, step: None, prints_lines=False)
            trainer = build_trainer(config, self.model, history, self.work, Interruption(), callbacks)
            trainer.callbacks.append(  # type: ignore[attr-defined]  # set at run time
                LambdaCallback(on_train_batch_end=lambda *_: clock.tick())
            )
            self.model.step_graphs = step_graphs(config.trainer, self.model)
            trainer.fit(self.model, PackedData(config.processed, config.loader, config.seed))
            self.model.step_graphs = None
        return clock.per_step

    def hand_written(self, steps: int) -> float:
        """Seconds per step of a plain PyTorch loop over the same batches, in the same precision."""
        torch.use_deterministic_algorithms(False)  # PyTorch's default; `trainer.fit` has turned it on
        self.model.to(self.device).train()
        step = self.stepping(self.model, steps)
        clock, waited = StepClock(steps), 0.0
        iterator = islice(self.batches(), steps)
        batch = next(iterator)
        while batch is not None:
            step(batch)
            clock.tick()
            start = time.perf_counter()
            batch = next(iterator, None)  # type: ignore[arg-type]  # None ends the loop
            waited += time.perf_counter() - start
        self.batch_share = waited / (clock.per_step * (steps - 1))
        return clock.per_step

    def stock(self, steps: int) -> float:
        """Seconds per step of ordinary code for this task.

        The workers of its `DataLoader` read ahead during the first step, which is not timed.
        """
        torch.use_deterministic_algorithms(False)
        clock = StepClock(steps)
        with warnings.catch_warnings(action="ignore"):
            stock.LOOPS[self.meta["kind"]](self.config, self.meta, self.split, self.device, clock)
        return clock.per_step

    def stepping(self, model: Any, steps: int) -> Step:
        """A training step in plain PyTorch for this model."""
        optimizers, schedules = optimizers_of(model, steps)
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, uses_bf16(self.config.trainer))
        clip = self.config.trainer.gradient_clip

        def clipped(module: torch.nn.Module) -> None:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)

        def classify(batch: tuple[Tensor, ...]) -> None:
            *inputs, labels = batch
            with autocast():
                loss = F.cross_entropy(model(*inputs).float(), labels, label_smoothing=model.label_smoothing)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            clipped(model)
            for part in (*optimizers, *schedules):
                part.step()

        def translate(batch: tuple[Tensor, ...]) -> None:
            generator_optimizer, discriminator_optimizer = optimizers
            with autocast():
                source, target = (scaled(side, torch.float32) for side in batch)
                fake = model.generator(source)
                model.discriminator.requires_grad_(True)
                real_loss = model.judged(model.discriminator(source, target), True)
                fake_loss = model.judged(model.discriminator(source, fake.detach()), False)
            discriminator_optimizer.zero_grad()
            ((real_loss + fake_loss) / 2).backward()
            clipped(model.discriminator)
            discriminator_optimizer.step()

            model.discriminator.requires_grad_(False)
            with autocast():
                loss = model.judged(model.discriminator(source, fake), True)
                loss = loss + model.l1 * F.l1_loss(fake.float(), target.float())
            generator_optimizer.zero_grad()
            loss.backward()
            clipped(model.generator)
            generator_optimizer.step()
            model.discriminator.requires_grad_(True)
            for schedule in schedules:
                schedule.step()

        def translate_unpaired(batch: tuple[Tensor, ...]) -> None:
            networks = {optimizers[0]: model.discriminator, optimizers[1]: model.generator}  # frozen in its step

            @contextlib.contextmanager
            def learning(optimizer: Any) -> Iterator[None]:
                networks[optimizer].requires_grad_(False)
                yield
                networks[optimizer].requires_grad_(True)

            def descend(optimizer: Any, loss: Tensor) -> None:
                optimizer.zero_grad()
                with torch.autocast(self.device.type, enabled=False):
                    loss.backward()
                optimizer.step()

            with patch.multiple(model, learning=learning, descend=descend), autocast():
                model.step(batch, optimizers, 0)
            for schedule in schedules:
                schedule.step()

        if isinstance(model, CycleGAN):
            return translate_unpaired
        return translate if isinstance(model, Pix2Pix) else classify

    def flops(self, steps: int) -> float:
        """Floating-point operations per step, as the mean of the timed steps.

        Counted on one example twice and four times: one part grows with the elements of a batch (pixels, or tokens
        with their padding), the optimizer's does not. oneDNN's LSTM hides its matrix products from the counter, so
        texts are counted without it; the zeros between small maps do not count.
        """
        model = self.config.model(self.meta).to(self.device).train()
        batches = list(islice(self.batches(), 1, steps))
        step = self.stepping(model, steps)
        sizes, counts = [], []
        for examples in (2, 4):
            batch = tuple(torch.cat([values[:1]] * examples) for values in batches[0])
            with (
                warnings.catch_warnings(action="ignore"),  # of Intel GPUs, by mkldnn.flags
                torch.backends.mkldnn.flags(enabled=self.meta["kind"] != "text"),
                patch.object(Convolution, "SMALL", 0),
                FlopCounterMode(display=False) as counter,
            ):
                step(batch)
            sizes.append(batch[0].numel())
            counts.append(counter.get_total_flops())
        growth = (counts[1] - counts[0]) / (sizes[1] - sizes[0])
        elements = sum(batch[0].numel() for batch in batches) / len(batches)
        return counts[0] + growth * (elements - sizes[0])


def optimizers_of(model: pl.LightningModule, steps: int) -> tuple[list[Any], list[Any]]:
    """The model's optimizers and schedules for a run of `steps` steps, from any form that Lightning accepts."""
    model.trainer = SimpleNamespace(estimated_stepping_batches=steps)  # type: ignore[assignment]  # all that models read
    configured: Any = model.configure_optimizers()
    if isinstance(configured, tuple):
        optimizers, schedules = configured
    else:
        parts = [part if isinstance(part, dict) else {"optimizer": part} for part in _listed(configured)]
        optimizers = [part["optimizer"] for part in parts]
        schedules = [part["lr_scheduler"] for part in parts if "lr_scheduler" in part]
    return list(optimizers), [s["scheduler"] if isinstance(s, dict) else s for s in schedules]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
