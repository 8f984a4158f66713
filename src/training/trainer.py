"""Builds the Lightning trainer from the configuration, and adapts a model to the hardware before training."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from pytorch_lightning.loggers import Logger

from src.common.errors import ConfigError
from src.common.hardware import device_of, fast_bf16
from src.common.signals import Interruption
from src.configuration import schema
from src.configuration.declarations import monitor_direction
from src.models.base import Model
from src.models.step_graphs import StepGraphs
from src.training.checkpoints import LAST, AtomicCheckpointIO
from src.training.determinism import RandomStatePerBatch
from src.training.history import History, RequireMonitor, is_terminal, progress_bar
from src.training.interruption import WorkingCheckpoint
from src.training.ranks import ExistingGroup, ExistingGroupDDP

BEST = "best"
WARM_UP_EPOCHS = 10  # so that what changes on a run's way, such as the size of pictures, occurs


def uses_bf16(config: schema.Trainer) -> bool:
    """Whether training computes in bf16 (weights stay fp32): asked for, or fast on this device."""
    return config.precision == "bf16" or (config.precision == "auto" and fast_bf16(device_of(config.accelerator)))


def require_gpus(config: schema.Trainer) -> None:
    """Checks that the GPUs are there, and what compiles for them, before anything is prepared or written.

    Raises:
        ConfigError: there are fewer GPUs than asked for, or no C compiler.
    """
    if device_of(config.accelerator).type != "cuda":
        return
    if (count := torch.cuda.device_count()) < config.devices:
        raise ConfigError(
            f"trainer.devices: {config.devices} on {config.accelerator!r}, but torch sees {count} CUDA devices here; "
            "use trainer=cpu" + (f" or trainer.devices={count}" if count else "")
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if config.compile and not (compiler and header.exists()):  # Triton builds a launcher for its kernels
        missing = f"{header} (python3-dev)" if compiler else "a C compiler (gcc)"
        raise ConfigError(f"trainer.compile: true, but {missing} is missing: install it, or use trainer.compile=false")


def build_trainer(
    config: schema.Config,
    model: pl.LightningModule,
    history: History,
    work: Path,
    interruption: Interruption,
    callbacks: Sequence[Callback] = (),
    logger: Logger | None = None,
) -> pl.Trainer:
    """The trainer for `model`, with `callbacks` and the configured ones beside its own; checkpoints go to `work`.

    Raises:
        ConfigError: a configured callback can't be built.
    """
    _silence()
    settings = config.trainer
    callbacks = [
        RandomStatePerBatch(config.seed),
        RequireMonitor(settings.monitor),  # before those that read it
        history,
        *callbacks,
        *(_configured_callback(name, callback) for name, callback in settings.callbacks.items()),
    ]
    if settings.max_time:
        callbacks.append(Timer(settings.max_time, verbose=False))
    if settings.keep == "best":
        callbacks.append(
            ModelCheckpoint(
                work,
                filename=BEST,
                monitor=settings.monitor,
                mode=monitor_direction(config),
                save_weights_only=True,
                enable_version_counter=False,
            )
        )
    if settings.early_stopping:
        stop = settings.early_stopping
        callbacks.append(
            EarlyStopping(
                settings.monitor, mode=monitor_direction(config), patience=stop.patience, min_delta=stop.min_delta
            )
        )
    # Last: it saves the state of the callbacks before it.
    callbacks.append(WorkingCheckpoint(work / LAST, settings.checkpoint_seconds, interruption))
    if is_terminal():
        callbacks.append(progress_bar())
    limits: dict[str, Any] = {key: getattr(settings, key) for key in ("limit_train_batches", "limit_val_batches")}
    if settings.overfit_batches:
        limits["limit_train_batches"] = settings.overfit_batches
    model.gradient_clip = settings.gradient_clip  # type: ignore[assignment]
    trainer = pl.Trainer(
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        # Otherwise DDP orders its buckets anew after a process's first step, and of three or more processes the sums
        # of a resumed run would differ in their last bits.
        strategy=ExistingGroupDDP(find_unused_parameters=True) if settings.distributed else "auto",
        max_epochs=settings.max_epochs,
        check_val_every_n_epoch=settings.validate_every,
        log_every_n_steps=settings.log_every,
        logger=logger or False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), ExistingGroup()],
        profiler=settings.profiler,
        enable_progress_bar=is_terminal(),
        default_root_dir=work,
        **_settings_of_steps(settings, model),
        **limits,
    )
    # At each step Lightning (2.6.6) asks over the network, and waits for a GPU, whether the first process got a signal;
    # WorkingCheckpoint does so every few steps.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _settings_of_steps(config: schema.Trainer, model: pl.LightningModule) -> dict[str, Any]:
    """How a step is computed, as arguments of Lightning's trainer."""
    return {
        "accelerator": "gpu" if device_of(config.accelerator).type == "cuda" else "cpu",
        "precision": "bf16-mixed" if uses_bf16(config) else "32-true",
        "accumulate_grad_batches": config.accumulate_grad_batches,
        "gradient_clip_val": config.gradient_clip if model.automatic_optimization else None,
        "deterministic": config.deterministic,
        "benchmark": config.benchmark,
        "num_sanity_val_steps": 0,  # the first epoch's validation comes soon enough
        "use_distributed_sampler": False,  # src.data.batching distributes the batches
        "enable_model_summary": False,
    }


def on_one_gpu(config: schema.Trainer) -> bool:
    """Whether one process trains on a GPU."""
    return device_of(config.accelerator).type == "cuda" and not config.distributed


def step_graphs(config: schema.Trainer, model: Model) -> StepGraphs | None:
    """What takes the model's steps as CUDA graphs; None where Lightning takes them."""
    return StepGraphs() if config.cuda_graphs and on_one_gpu(config) and not model.varies_in_shape else None


def warm_up(config: schema.Config, model: Model, data: pl.LightningDataModule) -> None:
    """Takes a step of each of ten short epochs and validates once, then puts the model's state back; on a GPU.

    There the first steps take seconds, which are no part of the training: compilation for each size of batch, the
    libraries' start, the choice of their algorithms. What a graph captures must have run without one before.
    """
    tensors = [*model.parameters(), *model.buffers()]
    state = [tensor.detach().clone() for tensor in tensors]
    graphs = step_graphs(config.trainer, model)
    for taker in (None, graphs) if graphs else (None,):
        model.step_graphs = taker
        trainer = pl.Trainer(
            devices=1,
            max_epochs=WARM_UP_EPOCHS,
            limit_train_batches=1,
            check_val_every_n_epoch=WARM_UP_EPOCHS,
            limit_val_batches=config.trainer.limit_val_batches,
            logger=False,
            callbacks=[RandomStatePerBatch(config.seed)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            **_settings_of_steps(config.trainer, model),
        )
        trainer.fit(model, data)
    with torch.no_grad():
        for tensor, value in zip(tensors, state, strict=True):
            tensor.copy_(value)
    for _, metric in model.epoch_metrics():
        metric.reset()


def _configured_callback(name: str, config: schema.CallbackConfig) -> Callback:
    module, _, attribute = config.target.rpartition(".")
    if not issubclass(getattr(importlib.import_module(module), attribute), Callback):
        raise ConfigError(f"trainer.callbacks.{name}: {config.target} is not a Lightning callback")
    try:
        callback: Callback = config()
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer.callbacks.{name}: {' '.join(str(error).split())}") from error
    return callback


def adapt(model: Model, config: schema.Trainer) -> None:
    """Lays convolutions' weights out as channels_last, and compiles if configured; the state dict's keys stay the same.

    In that layout convolutions on a CPU are 1.5 times as fast in fp32, 3 times with bf16. Each size of picture gets a
    graph of its own: torch would replace the second by one for all sizes, so that a run that is resumed at the second
    size would compute in other kernels, with other bits.
    """
    model.to(memory_format=torch.channels_last)
    if config.compile and not model.varies_in_shape:
        for part in model.compiled_parts():
            if type(part).__module__.startswith("torch.nn."):  # of a layer of its own, torch 2.12 compiles nothing
                part.forward = torch.compile(part.forward, dynamic=False)
            else:
                part.compile(dynamic=False)


def _silence() -> None:
    """Silences those of Lightning's tips and warnings that do not apply to this project."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*LeafSpec.*deprecated.*",
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*Trying to infer the `batch_size`.*",
        r".*AccumulateGrad node.s stream.*",
        r".*sync_dist=True.*",  # an epoch's metrics are reduced before they are logged
        r".*functional\.all_gather is deprecated.*",  # Lightning's own call
        r".*`training_step` returned `None`.*",  # a graph has taken the whole step
        r".*dataloader is not resumable.*",  # PackedData saves the epoch and the batches consumed
    ):
        warnings.filterwarnings("ignore", message=pattern)
