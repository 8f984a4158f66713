"""A trial as the worker trains it: a run like any other, but for what it writes. Only its figures are kept."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer

from src import tasks
from src.common.errors import Failure, Lost
from src.configuration.composing import write_resolved
from src.configuration.schema import Config
from src.data import packed
from src.data.batching import batches
from src.data.preparing import prepared
from src.exporting.latency import median_ms, one_thread
from src.reporting import tables
from src.sweeping.space import LATENCY, PARAMETERS
from src.sweeping.worker import Ended, Job
from src.tracking.tracker import CONFIG, STATE_TAG, Tracker
from src.training import determinism
from src.training import run as training
from src.training.trainer import require_gpus

STUDY_TAG, TRIAL_TAG, STATE = "sweep.study", "sweep.trial", "sweep.state"
LATENCY_SECONDS = 0.5  # for which calls are repeated


class Reporter(Callback):
    """Tells the sweep a metric after each validation, and ends the training early where the sweep asks for it."""

    def __init__(self, metric: str, report: Callable[[int, float], bool]) -> None:
        self.metric = metric
        self.report = report
        self.pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.metric not in trainer.callback_metrics:
            return
        epoch, value = trainer.current_epoch + 1, float(trainer.callback_metrics[self.metric])
        if not math.isfinite(value):
            raise Failure(f"{self.metric} is {value} after epoch {epoch}")
        ends = self.report(epoch, value)
        if ends and epoch < (trainer.max_epochs or 0):
            self.pruned = trainer.should_stop = True


def run(job: Job, config: Config, report: Callable[[int, float], bool]) -> Ended:
    """Trains a trial, or goes on with it where its process was killed; writes history, metrics and configuration.

    Raises:
        Failure: it can't be trained, became NaN, or has no such objective.
        SystemExit: a signal asked for the end; a checkpoint is saved.
    """
    try:
        return _run(job, config, report)
    finally:
        gc.collect()  # a trainer and its model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(job: Job, config: Config, report: Callable[[int, float], bool]) -> Ended:
    require_gpus(config.trainer)
    config = prepared(config)
    determinism.fix(config.seed, config.trainer.threads_each)
    meta = packed.read_meta(config.processed)
    work = training.work_folder(config, meta, job.work)
    reporter = Reporter(job.objectives[0], report)
    tags = training.tags(config, meta, work) | {STUDY_TAG: job.study, TRIAL_TAG: str(job.number)}
    with (
        work.held(),
        Tracker.resume(
            journal=work.journal,
            experiment=config.name,
            name=f"{job.study} {job.number}",
            params=training.parameters(config),
            tags=tags,
            description=training.note(config),
            parent=job.parent,
            sender=False,
        ) as tracker,
    ):
        tracker.log_text(yaml.safe_dump(config.plain(), sort_keys=False), CONFIG)
        try:
            trained = training.fit(config, meta, work, tracker.log_metrics, [reporter])
            kept = training.kept_row(config, trained.history.rows)
            measured = _measured(job.objectives, trained.model, config)
            values = tuple(_value(name, kept | measured) for name in job.objectives)
        except Lost:
            raise
        except Exception:
            work.forget()  # it would fail again
            raise
        _write(config, trained.history.rows, kept | measured)
        tracker.log_metrics({"train_seconds": trained.history.seconds, **measured}, step=0)
        tracker.log_artifact(config.folder / "train" / "history.csv")
        tracker.set_tags({STATE_TAG: trained.state, STATE: "pruned" if reporter.pruned else "complete"})
    work.forget()
    return Ended(values, reporter.pruned, trained.history.seconds)


def _measured(objectives: Sequence[str], model: LightningModule, config: Config) -> dict[str, float]:
    """Those objectives that are not the validation's."""
    measured = {}
    if PARAMETERS in objectives:
        measured[PARAMETERS] = float(sum(parameter.numel() for parameter in model.parameters()))
    if LATENCY in objectives:
        measured[LATENCY] = _latency_ms(model, config)
    return measured


@torch.no_grad()
def _latency_ms(model: Any, config: Config) -> float:
    """Milliseconds for one validation example on one thread of the CPU, eager fp32: the median of several calls."""
    _, task = tasks.of(config)
    val = batches(config.processed, "val", config.loader, train=False)
    inputs = task.inputs(val.meta["kind"])
    model = model.cpu().eval()
    batch = next(iter(task.batches(model, val)))
    example = inputs.trimmed(*(value[:1] for value in batch[: len(inputs.names)]))
    with one_thread():
        (milliseconds,) = median_ms([partial(model.answer, *example)], LATENCY_SECONDS)
    return milliseconds


def _value(name: str, found: Mapping[str, float]) -> float:
    if name not in found:
        raise Failure(f"sweep.objectives.{name}: was not logged; these were: {', '.join(sorted(found))}")
    if not math.isfinite(found[name]):
        raise Failure(f"{name} is {found[name]}")
    return float(found[name])


def _write(config: Config, rows: Sequence[Mapping[str, float]], kept: Mapping[str, float]) -> None:
    """What a direct run writes, but for weights and pictures: best.yaml makes them again, to the bit."""
    folder = config.folder / "train"
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config.folder / "config.yaml", config.plain())
    tables.write_csv(folder / "history.csv", rows)
    tables.write_metrics(folder / "metrics.json", {"profile": config.profile.name, **kept})
