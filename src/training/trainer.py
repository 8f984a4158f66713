"""A Lightning trainer from the configuration, and what is done to a model before it is trained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint

from src.common.errors import ConfigError
from src.common.hardware import fast_bf16
from src.configuration import schema
from src.configuration.declarations import monitor_direction
from src.training.checkpoints import LAST, AtomicCheckpointIO
from src.training.determinism import RandomStatePerBatch
from src.training.history import History, on_terminal, progress_bar
from src.training.interruption import Interruption, WorkingCheckpoint
from src.training.ranks import Group, Joined

BEST = "best"


def device_of(config: schema.Trainer) -> torch.device:
    """Where training happens."""
    gpu = config.accelerator == "gpu" or (config.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def bf16_pays(config: schema.Trainer) -> bool:
    """Whether training computes in bf16 (weights stay fp32)."""
    return config.precision == "bf16" or (config.precision == "auto" and fast_bf16(device_of(config)))


def require_gpus(config: schema.Trainer) -> None:
    """Asks for the devices before anything is prepared or written.

    Raises:
        ConfigError: there are fewer GPUs than asked for.
    """
    if device_of(config).type == "cuda" and (found := torch.cuda.device_count()) < config.devices:
        raise ConfigError(
            f"trainer.devices: {config.devices} on {config.accelerator!r}, but torch sees {found} CUDA devices here; "
            "use trainer=cpu" + (f" or trainer.devices={found}" if found else "")
        )


def build_trainer(
    config: schema.Config,
    model: pl.LightningModule,
    history: History,
    work: Path,
    interruption: Interruption,
    more: Sequence[Callback] = (),
) -> pl.Trainer:
    """The trainer for `model`, with the callbacks `more` beside its own; its checkpoints go to `work`."""
    _silence()
    asked = config.trainer
    gpu = device_of(asked).type == "cuda"
    callbacks: list[Callback] = [
        RandomStatePerBatch(config.seed),
        history,
        *more,
    ]
    if asked.keep == "best":
        callbacks.append(
            ModelCheckpoint(
                work,
                filename=BEST,
                monitor=asked.monitor,
                mode=monitor_direction(config),
                save_weights_only=True,
                enable_version_counter=False,
            )
        )
    if asked.early_stopping:
        stop = asked.early_stopping
        callbacks.append(
            EarlyStopping(
                asked.monitor, mode=monitor_direction(config), patience=stop.patience, min_delta=stop.min_delta
            )
        )
    # After all whose state it keeps.
    callbacks.append(WorkingCheckpoint(work / LAST, asked.checkpoint_seconds, interruption))
    if on_terminal():
        callbacks.append(progress_bar())
    limits: dict[str, Any] = {
        key: value for key in ("limit_train_batches", "limit_val_batches") if (value := getattr(asked, key)) is not None
    }
    if asked.overfit_batches:
        limits["limit_train_batches"] = asked.overfit_batches
    manual = not model.automatic_optimization
    if manual:
        model.gradient_clip = asked.gradient_clip  # type: ignore[assignment]
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=asked.devices,
        num_nodes=asked.num_nodes,
        strategy=Joined(find_unused_parameters=manual) if asked.distributed else "auto",
        precision="bf16-mixed" if bf16_pays(asked) else "32-true",
        max_epochs=asked.max_epochs,
        gradient_clip_val=None if manual else asked.gradient_clip,
        check_val_every_n_epoch=asked.validate_every,
        log_every_n_steps=asked.log_every,
        deterministic=asked.deterministic,
        benchmark=False,
        num_sanity_val_steps=0,  # the first epoch's validation comes soon enough
        use_distributed_sampler=False,  # batches are shared out by src.data.batching
        logger=False,  # History and the tracker keep the log
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), Group()],
        profiler=asked.profiler,
        enable_progress_bar=on_terminal(),
        enable_model_summary=False,
        default_root_dir=work,
        **limits,
    )


def adapt(model: pl.LightningModule, config: schema.Trainer) -> None:
    """Lays out convolutions' weights and compiles, as the configuration asks; the state dict's keys stay the same."""
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.compile:
        for part in model.children():
            part.compile()


def _silence() -> None:
    """Lightning's tips and notices that tell a user of this project nothing."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for notice in (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*LeafSpec.*deprecated.*",
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*Trying to infer the `batch_size`.*",
        r".*AccumulateGrad node.s stream.*",
        r".*sync_dist=True.*",  # an epoch's figures are reduced before they are logged
        r".*functional\.all_gather is deprecated.*",  # Lightning's own call
        r".*dataloader is not resumable.*",  # PackedData hands back the epoch and the batches consumed
    ):
        warnings.filterwarnings("ignore", message=notice)
