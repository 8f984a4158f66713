"""Trains one trial: a training run that keeps its configuration, history and metrics, but no weights."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from src import tasks
from src.common.errors import Failure, Lost
from src.common.yaml_files import dump_yaml
from src.configuration.composing import write_resolved
from src.configuration.schema import Config
from src.data import packed
from src.data.batching import batches
from src.data.preparing import prepared
from src.exporting.latency import median_ms, one_thread
from src.reporting import tables
from src.sweeping.messages import Ended, Job
from src.sweeping.space import LATENCY, PARAMETERS
from src.tracking.run_facts import run_datasets, run_description, run_parameters, run_tags
from src.tracking.tracker import CONFIG, STATE_TAG, RunInfo, Tracker
from src.training import determinism
from src.training import run as training
from src.training.start import weights_tags, with_weights
from src.training.trainer import require_gpus

STUDY_TAG, TRIAL_TAG, STATE = "sweep.study", "sweep.trial", "sweep.state"
LATENCY_SECONDS = 0.5  # for which calls are repeated


class MetricNotLogged(Failure):
    """A metric that the sweep needs is not logged: a name is wrong, for every trial."""


class Reporter(Callback):
    """Reports a metric after each validation, and stops the training where the sweep prunes it."""

    def __init__(self, metric: str, report: Callable[[int, float], bool], required: Sequence[str] = ()) -> None:
        """`report(epoch, value)` returns whether the trial is pruned; `required`: metrics that have to be logged."""
        self.metric = metric
        self.report = report
        self.required = required
        self.pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        if missing := [name for name in self.required if name not in metrics]:
            logged = ", ".join(sorted(name for name in metrics if name.startswith("val_")))
            raise MetricNotLogged(
                f"{missing[0]}: the validation logs no such metric, but {logged}: "
                "correct sweep.objectives or trainer.monitor"
            )
        if self.metric not in metrics:  # it is measured after training
            return
        epoch, value = trainer.current_epoch + 1, float(metrics[self.metric])
        if not math.isfinite(value):
            raise Failure(f"{self.metric} is {value} after epoch {epoch}")
        if self.report(epoch, value) and epoch < (trainer.max_epochs or 0):
            self.pruned = trainer.should_stop = True


def run(job: Job, config: Config, report: Callable[[int, float], bool]) -> Ended:
    """Trains a trial, from its checkpoint if there is one; writes history, metrics and configuration.

    Raises:
        MetricNotLogged: the validation does not log an objective or the monitor.
        Failure: it can't be trained, or became NaN.
        SystemExit: a signal stopped it; a checkpoint is saved.
    """
    try:
        return _run(job, config, report)
    finally:
        gc.collect()  # a trainer and its model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(job: Job, config: Config, report: Callable[[int, float], bool]) -> Ended:
    require_gpus(config.trainer)
    config = with_weights(prepared(config))
    determinism.fix(config.seed, config.trainer.threads_each)
    meta = packed.read_meta(config.processed)
    work = training.work_folder(config, meta, job.work)
    reporter = Reporter(job.objectives[0], report, _required_metrics(job.objectives, config))
    tags = (
        run_tags(config, meta, fingerprint=work.key, threads=torch.get_num_threads())
        | weights_tags(config)
        | {
            STUDY_TAG: job.study,
            TRIAL_TAG: str(job.number),
        }
    )
    info = RunInfo(
        experiment=config.name,
        name=f"{job.study} {job.number}",
        params=run_parameters(config),
        tags=tags,
        description=run_description(config),
        parent=job.parent,
        is_tracked=config.tracking,
    )
    with (
        work.locked(),
        Tracker.resume(work.journal, info, sender=False) as tracker,
    ):
        tracker.log_datasets(run_datasets(config, meta, "train", "val"))
        tracker.log_text(dump_yaml(config.record()), CONFIG)
        try:
            trained = training.fit(config, meta, work, tracker.log_metrics, [reporter])
            measurements = _measure(job.objectives, trained.model, config)
            metrics = training.kept_row(config, trained.history.rows) | measurements
            values = tuple(_value(name, metrics) for name in job.objectives)
        except Lost:
            raise
        except Exception:
            work.remove_checkpoints()  # from its checkpoint it would fail again
            raise
        _write(config, trained.history.rows, metrics)
        tracker.log_metrics({"train_seconds": trained.history.seconds, **measurements}, step=0)
        tracker.log_artifact(config.folder / "train" / "history.csv")
        tracker.set_tags({STATE_TAG: trained.optimizer_sha256, STATE: "pruned" if reporter.pruned else "complete"})
    work.remove_checkpoints()
    return Ended(values, reporter.pruned, trained.history.seconds)


def _required_metrics(objectives: Sequence[str], config: Config) -> list[str]:
    """The metrics that each validation has to log."""
    metrics = [name for name in objectives if name not in (PARAMETERS, LATENCY)]
    if config.trainer.keep == "best" or config.trainer.early_stopping:
        metrics.append(config.trainer.monitor)
    return metrics


def _measure(objectives: Sequence[str], model: LightningModule, config: Config) -> dict[str, float]:
    """The values of the objectives that are measured after training."""
    values = {}
    if PARAMETERS in objectives:
        values[PARAMETERS] = float(sum(parameter.numel() for parameter in model.parameters()))
    if LATENCY in objectives:
        values[LATENCY] = _latency_ms(model, config)
    return values


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


def _value(name: str, values: Mapping[str, float]) -> float:
    if name not in values:
        raise Failure(f"sweep.objectives.{name}: not logged in the last epoch, only {', '.join(sorted(values))}")
    if not math.isfinite(values[name]):
        raise Failure(f"{name} is {values[name]}")
    return float(values[name])


def _write(config: Config, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> None:
    """Writes the files of a direct run, except for weights and pictures."""
    folder = config.folder / "train"
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config.folder / "config.yaml", config.record())
    tables.write_csv(folder / "history.csv", rows)
    tables.write_metrics(folder / "metrics.json", {"profile": config.profile.name, **metrics})
