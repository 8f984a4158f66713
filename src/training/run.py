"""One training run, from its work folder to its result: that of the train stage, or of a trial of a sweep."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.trainer.states import TrainerStatus

from src.common.console import console
from src.common.errors import Failure
from src.common.paths import ROOT, WORK
from src.common.signals import Interruption
from src.configuration import schema
from src.configuration.declarations import monitor_direction
from src.configuration.schema import Config
from src.data import packed
from src.data.batching import batches
from src.data.datamodule import PackedData
from src.models.base import Model
from src.tracking.logger import LogMetrics, TrackerLogger
from src.training import checkpoints, ranks, start
from src.training.checkpoints import WorkFolder
from src.training.determinism import sha256_of_state
from src.training.history import History, is_terminal
from src.training.memory import refuse_too_large
from src.training.trainer import BEST, adapt, build_trainer, on_one_gpu, step_graphs, warm_up


@dataclass(frozen=True)
class Trained:
    """The result of a run: the model, its history, the sha256 of its optimizers' last state."""

    model: Model
    history: History
    optimizer_sha256: str


def work_folder(config: Config, meta: Mapping[str, Any], root: Path = WORK) -> WorkFolder:
    """The folder of this run's checkpoints and journal. Call it after `determinism.fix`: threads count."""
    return WorkFolder(config.name, checkpoints.identity(config, meta["splits"], start.digests(config)), root)


def fit(
    config: Config,
    meta: dict[str, Any],
    work: WorkFolder,
    log_metrics: LogMetrics | None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Trains from the start, or from the work folder's checkpoint.

    Of several processes the first one calls it as if it were alone; the others pass None as `log_metrics`.

    Raises:
        Failure: the loss or the weights became NaN, the monitored metric is not logged, training ended early, the best
            checkpoint is damaged, another process failed.
        SystemExit: a signal asked for the end; a checkpoint is saved.
    """
    with ranks.run_group(config.trainer):
        return _fit(config, meta, work, log_metrics, callbacks)


def _fit(
    config: Config,
    meta: dict[str, Any],
    work: WorkFolder,
    log_metrics: LogMetrics | None,
    callbacks: Sequence[Callback],
) -> Trained:
    is_first = log_metrics is not None
    if is_first:
        ranks.broadcast((config.plain(), str(work.path.parent)))
    checkpoint, key = ranks.broadcast((work.resumable(), work.key) if is_first else (None, ""))
    if work.key != key:
        raise Failure("code, data, packages or threads are others here than in the run's first process")

    logger = TrackerLogger(log_metrics)
    history = History(logger.log_history, prints_lines=is_first and not is_terminal())
    interruption = Interruption(announce=is_first)
    data = PackedData(config.processed, config.loader, config.seed, same_batches=config.trainer.overfit_batches > 0)
    model = config.model(meta | start.architecture(config))
    trainer = build_trainer(config, model, history, work.path, interruption, callbacks, logger)

    if checkpoint and is_first:
        console.print(f"goes on with the run that was interrupted ({os.path.relpath(checkpoint, ROOT)})")
    if not checkpoint:
        options = {"train": True, "seed": config.seed, "world": config.trainer.processes}
        refuse_too_large(config, meta, model, batches(config.processed, "train", config.loader, **options))
        start.load_start(model, config)
        model.prepare(packed.read_split(config.processed, "train"))
    adapt(model, config.trainer)
    if on_one_gpu(config.trainer):
        started = time.perf_counter()
        warm_up(config, model, PackedData(config.processed, config.loader, config.seed))
        console.print(f"warmed up in {time.perf_counter() - started:.1f} s, which do not count as training")
    model.step_graphs = step_graphs(config.trainer, model)
    with interruption.handling():
        try:
            trainer.fit(model, data, ckpt_path=checkpoint)
        except SystemExit:  # Lightning's own end on SIGTERM, before its first batch, has the code 0
            sys.exit(interruption.exit_code)
    if trainer.state.status != TrainerStatus.FINISHED:
        raise Failure(f"training ended early ({trainer.state.status}); the same command goes on with it")
    if config.trainer.max_time and is_first:
        _note_time_limit(trainer, history, config.trainer)
    optimizer_sha256 = sha256_of_state([optimizer.state_dict() for optimizer in trainer.optimizers])
    if config.trainer.keep == "best":
        _load_best(model, work)
    return Trained(model, history, optimizer_sha256)


def _note_time_limit(trainer: Trainer, history: History, settings: schema.Trainer) -> None:
    """Prints that `trainer.max_time` ended the training, if it did.

    Raises:
        Failure: it did so before the first epoch was validated.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
    timer = next(callback for callback in callbacks if isinstance(callback, Timer))
    if (timer.time_remaining() or 0) > 0:
        return
    if not history.rows:
        raise Failure(f"trainer.max_time: {settings.max_time} is over before anything was trained; give it more")
    console.print(
        f"trainer.max_time: {settings.max_time} is over, in epoch {len(history.rows)} of {settings.max_epochs}"
    )


def _load_best(model: Model, work: WorkFolder) -> None:
    """Loads the weights of the best epoch; the last ones stay where no epoch was validated."""
    best = work.path / f"{BEST}.ckpt"
    if not best.exists():
        return
    if not checkpoints.is_intact(best):
        raise Failure(f"{best} is damaged (its sha256 differs): delete {work.path} and train again")
    model.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])


def kept_row(config: Config, rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The history's row of the epoch whose weights are kept: the last one, or the best one by `monitor`."""
    monitor, mode = config.trainer.monitor, monitor_direction(config)
    candidates = [row for row in rows if monitor in row] if config.trainer.keep == "best" else []
    return (max if mode == "max" else min)(candidates, key=lambda row: row[monitor]) if candidates else rows[-1]
