"""Training: what `trainer.fit` adds to a hand-written loop, what a user would otherwise run, and what bounds both."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, stock
from benchmarks.setting import Setting
from benchmarks.table import Figure, at_most
from benchmarks.timing import Measure, StepClock, paired
from src.common.hardware import keep_memory
from src.configuration.schema import Config
from src.data import kinds, packed
from src.data.batching import Batch, Batches
from src.data.datamodule import PackedData
from src.models.adversarial import scaled
from src.models.pix2pix import Pix2Pix
from src.models.resnet import Convolution
from src.training import determinism
from src.training.history import History
from src.training.interruption import Interruption
from src.training.trainer import adapt, bf16_pays, build_trainer, device_of

LOOP_OVERHEAD = at_most(1.05)
BATCH_SHARE = at_most(2.0)  # percent of a step
STOCK_ROUNDS = 2  # the stock loops are several times slower: a fair share of the time
Step = Callable[[Batch], None]


def measure(setting: Setting) -> list[Figure]:
    """Each experiment at its configuration: our trainer, a hand-written loop and the stock one, in turn."""
    keep_memory()
    return [figure for name in setting.experiments for figure in measure_one(name, setting)]


def measure_one(name: str, setting: Setting) -> list[Figure]:
    """The figures of one experiment."""
    config = setting.prepare(name)
    determinism.fix(config.seed, config.trainer.threads)
    loops = Loops(config, setting.folder / name / "work")
    steps = loops.steps_in(setting.seconds)
    gemm = machine.gemm(torch.bfloat16 if bf16_pays(config.trainer) else torch.float32, loops.device)
    candidates: dict[str, Measure] = {
        "fit": partial(loops.fit, steps),
        "hand": partial(loops.hand_written, steps),
        "gemm": gemm,
    }
    ours = paired(candidates, setting.rounds)
    few = max(3, min(steps, round(setting.seconds / loops.stock(2))))
    theirs = paired({"fit": candidates["fit"], "stock": partial(loops.stock, few)}, min(STOCK_ROUNDS, setting.rounds))

    size = config.loader.batch_size
    label = f"training {name}"

    def rate(seconds: float) -> float:
        return size / seconds

    step_flops = loops.flops(steps)
    return [
        Figure(label, "trainer.fit", ours.spread("fit", rate), "examples/s"),
        Figure(label, "hand-written loop", ours.spread("hand", rate), "examples/s"),
        Figure(label, "stock code", theirs.spread("stock", rate), "examples/s"),
        Figure(label, "time of trainer.fit / hand-written loop", ours.ratio("fit", "hand"), "", LOOP_OVERHEAD),
        Figure(label, "speed of trainer.fit / stock code", theirs.ratio("stock", "fit"), "x"),
        Figure.single(label, "time for batches", 100 * loops.batch_share, "% of a step", BATCH_SHARE),
        Figure(label, "share of the matrix-product peak", ours.ratio("gemm", "fit", 100 * step_flops), "%"),
        Figure.single(label, "start, end and checkpoint of trainer.fit", loops.fit_overhead, "s"),
    ]


class Loops:
    """One experiment's training loops over the same model, each returning seconds per step.

    Every turn trains on the first batches of epoch 0, so the same work is timed each time, on images at their full
    size, as the stock loop takes them. `trainer.fit` runs with all that `src.train` gives it, but for validation, which
    is no part of a step, and for MLflow, which is told of every 50th.
    """

    def __init__(self, config: Config, work: Path) -> None:
        loader = config.loader.model_copy(update={"low_resolution": None})
        self.config = config = config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})
        self.work = work
        self.device = device_of(config.trainer)
        self.meta = packed.read_meta(config.processed)
        self.split = packed.read_split(config.processed, "train")
        self.model: pl.LightningModule = config.model(self.meta)
        self.model.prepare(self.split)
        adapt(self.model, config.trainer)
        self.batch_share = 0.0  # of the last hand-written loop's time
        self.fit_overhead = 0.0  # seconds that the last `trainer.fit` took beyond its steps

    def batches(self) -> Batches:
        """The training batches of an epoch 0, on the device."""
        kind = kinds.load(self.meta["kind"]).batches
        return kind(self.split, self.meta, self.config.loader, train=True, seed=self.config.seed).to(self.device)

    def steps_in(self, seconds: float) -> int:
        """About as many steps as take so long: at least 4, at most an epoch."""
        epoch = len(self.batches())
        probe = self.hand_written(min(4, epoch))
        return max(min(4, epoch), min(epoch, round(seconds / probe)))

    def fit(self, steps: int) -> float:
        """Seconds per step of `trainer.fit`, as `src.train` calls it."""
        clock = StepClock(steps)
        asked = {
            "max_epochs": 1,
            "limit_train_batches": steps,
            "limit_val_batches": 0,
            "keep": "last",
            "early_stopping": None,
        }
        config = self.config.model_copy(update={"trainer": self.config.trainer.model_copy(update=asked)})
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):  # no bar
            history = History(lambda metrics, step: None, lines=False)
            trainer = build_trainer(config, self.model, history, self.work, Interruption())
            trainer.callbacks.append(  # type: ignore[attr-defined]  # set at run time
                LambdaCallback(on_train_batch_end=lambda *_: clock.tick())
            )
            start = time.perf_counter()
            trainer.fit(self.model, PackedData(config.processed, config.loader, config.seed))
            self.fit_overhead = time.perf_counter() - start - steps * clock.per_step
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
            asked = time.perf_counter()
            batch = next(iterator, None)  # type: ignore[arg-type]  # None ends the loop
            waited += time.perf_counter() - asked
        self.batch_share = waited / (clock.per_step * (steps - 1))
        return clock.per_step

    def stock(self, steps: int) -> float:
        """Seconds per step of the usual code for this task.

        In its favour: the workers of its `DataLoader` read ahead during the first step, which is not timed.
        """
        torch.use_deterministic_algorithms(False)
        clock = StepClock(steps)
        with warnings.catch_warnings(action="ignore"):
            stock.LOOPS[self.meta["kind"]](self.config, self.meta, self.split, self.device, clock)
        return clock.per_step

    def stepping(self, model: Any, steps: int) -> Step:
        """A training step by hand: what a user would write for this model, without Lightning."""
        optimizers, schedules = optimizers_of(model, steps)
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, bf16_pays(self.config.trainer))
        clip = self.config.trainer.gradient_clip

        def clipped(module: torch.nn.Module) -> None:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)

        def classify(batch: Batch) -> None:
            *inputs, labels = batch
            with autocast():
                loss = F.cross_entropy(model(*inputs).float(), labels, label_smoothing=model.label_smoothing)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            clipped(model)
            for part in (*optimizers, *schedules):
                part.step()

        def translate(batch: Batch) -> None:
            for_generator, for_discriminator = optimizers
            with autocast():
                source, target = (scaled(side, torch.float32) for side in batch)
                drawn = model.generator(source)
                model.discriminator.requires_grad_(True)
                seen_real = model.judged(model.discriminator(source, target), True)
                seen_drawn = model.judged(model.discriminator(source, drawn.detach()), False)
            for_discriminator.zero_grad()
            ((seen_real + seen_drawn) / 2).backward()
            clipped(model.discriminator)
            for_discriminator.step()

            model.discriminator.requires_grad_(False)
            with autocast():
                loss = model.judged(model.discriminator(source, drawn), True)
                loss = loss + model.l1 * F.l1_loss(drawn.float(), target.float())
            for_generator.zero_grad()
            loss.backward()
            clipped(model.generator)
            for_generator.step()
            model.discriminator.requires_grad_(True)
            for schedule in schedules:
                schedule.step()

        return translate if isinstance(model, Pix2Pix) else classify

    def flops(self, steps: int) -> float:
        """Floating-point operations of a step, as the mean of the steps that are timed.

        Counted on one example twice and four times: one part grows with the elements of a batch (pixels, or tokens
        with their padding), the optimizer's does not. oneDNN's LSTM hides its matrix products from the counter, so
        texts are counted without it; zeros between small maps are no work.
        """
        model = self.config.model(self.meta).to(self.device).train()
        made = list(islice(self.batches(), 1, steps))
        step = self.stepping(model, steps)
        sizes, counts = [], []
        for examples in (2, 4):
            few = tuple(torch.cat([values[:1]] * examples) for values in made[0])
            with (
                warnings.catch_warnings(action="ignore"),  # of Intel GPUs, by mkldnn.flags
                torch.backends.mkldnn.flags(enabled=self.meta["kind"] != "text"),
                patch.object(Convolution, "SMALL", 0),
                FlopCounterMode(display=False) as counter,
            ):
                step(few)
            sizes.append(few[0].numel())
            counts.append(counter.get_total_flops())
        growth = (counts[1] - counts[0]) / (sizes[1] - sizes[0])
        elements = sum(batch[0].numel() for batch in made) / len(made)
        return counts[0] + growth * (elements - sizes[0])


def optimizers_of(model: pl.LightningModule, steps: int) -> tuple[list[Any], list[Any]]:
    """The model's own optimizers and schedules for a run of `steps` steps, in any form that Lightning takes them."""
    model.trainer = SimpleNamespace(estimated_stepping_batches=steps)  # type: ignore[assignment]  # all it is asked
    made: Any = model.configure_optimizers()
    if isinstance(made, tuple):
        optimizers, schedules = made
    else:
        parts = [part if isinstance(part, dict) else {"optimizer": part} for part in _listed(made)]
        optimizers = [part["optimizer"] for part in parts]
        schedules = [part["lr_scheduler"] for part in parts if "lr_scheduler" in part]
    return list(optimizers), [s["scheduler"] if isinstance(s, dict) else s for s in schedules]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
