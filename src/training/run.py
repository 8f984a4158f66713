"""One training run, from its work folder to what it reached. The train stage is one; so is each trial of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.trainer.states import TrainerStatus

from src.common.errors import Failure
from src.common.paths import ROOT
from src.configuration.declarations import monitor_direction
from src.configuration.fingerprints import stage_code
from src.configuration.schema import Config
from src.data import packed
from src.data.datamodule import PackedData
from src.tracking.provenance import environment
from src.tracking.tracker import DATA_TAG
from src.training import checkpoints, ranks
from src.training.checkpoints import WORK, WorkFolder
from src.training.determinism import sha256_of_state
from src.training.history import History, LogMetrics, on_terminal
from src.training.interruption import Interruption
from src.training.trainer import BEST, adapt, build_trainer


@dataclass(frozen=True)
class Trained:
    """What a run reached: the model, its history, the sha256 of its optimizers' last state."""

    model: LightningModule
    history: History
    state: str


def work_folder(config: Config, meta: Mapping[str, Any], root: Path = WORK) -> WorkFolder:
    """The folder of this very run's checkpoints and journal. Call it after `determinism.fix`: the threads count."""
    return WorkFolder(config.name, checkpoints.identity(config, meta["splits"]), root)


def tags(config: Config, meta: Mapping[str, Any], work: WorkFolder) -> dict[str, str]:
    """What a run in MLflow says of itself beside its parameters."""
    return _environment(config.trainer.accelerator, torch.get_num_threads()) | {
        "pipeline.profile": config.profile.name,
        "pipeline.fingerprint": work.key,
        "pipeline.code": stage_code("train", config).fingerprint,
        **{DATA_TAG + split: packed["sha256"] for split, packed in meta["splits"].items()},
        "pipeline.output": config.output,
    }


def parameters(config: Config) -> dict[str, Any]:
    """What a run in MLflow has as parameters: all but where it wrote, by which any two runs would differ."""
    return {key: value for key, value in config.plain().items() if key != "output"}


@cache
def _environment(device: str, threads: int) -> dict[str, str]:
    """What this process was started from: one that trains several runs has imported its code once."""
    return environment(device=device, threads=threads)


def note(config: Config) -> str:
    """The description of a run on its page in MLflow."""
    return f"{config.description} ({config.profile.note})"


def fit(
    config: Config,
    meta: dict[str, Any],
    work: WorkFolder,
    log_metrics: LogMetrics | None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Trains from the start, or from where the work folder's checkpoint stands.

    Of several processes the first one calls it as if it were alone; `log_metrics` None: this is another one.

    Raises:
        Failure: the loss became NaN, training ended early, the best checkpoint is damaged, another process failed.
        SystemExit: a signal asked for the end; a checkpoint is saved.
    """
    with ranks.assembled(config.trainer):
        return _fit(config, meta, work, log_metrics, callbacks)


def _fit(
    config: Config,
    meta: dict[str, Any],
    work: WorkFolder,
    log_metrics: LogMetrics | None,
    callbacks: Sequence[Callback],
) -> Trained:
    leads = log_metrics is not None
    if leads:
        ranks.broadcast((config.plain(), str(work.path.parent)))
    checkpoint, key = ranks.broadcast((work.resumable(), work.key) if leads else (None, ""))
    if work.key != key:
        raise Failure("code, data, packages or threads are others here than in the run's first process")
    lines = leads and not on_terminal()
    history = History(log_metrics or _unheard, lines=lines)
    data = PackedData(config.processed, config.loader, config.seed, same_batches=config.trainer.overfit_batches > 0)
    model = config.model(meta)
    interruption = Interruption(aloud=leads)
    trainer = build_trainer(config, model, history, work.path, interruption, callbacks)
    if checkpoint and leads:
        print(f"goes on with the run that was interrupted ({checkpoint.relative_to(ROOT)})", flush=True)
    if not checkpoint:
        model.prepare(packed.read_split(config.processed, "train"))
    adapt(model, config.trainer)
    with interruption.heeded():
        try:
            trainer.fit(model, data, ckpt_path=checkpoint)
        except SystemExit:  # Lightning's own end on SIGTERM, before its first batch, has the code 0
            sys.exit(interruption.exit_code)
    if trainer.state.status != TrainerStatus.FINISHED:
        raise Failure(f"training ended early ({trainer.state.status}); the same command goes on with it")
    state = sha256_of_state([optimizer.state_dict() for optimizer in trainer.optimizers])
    best = work.path / f"{BEST}.ckpt"
    if config.trainer.keep == "best" and best.exists():
        if not checkpoints.is_whole(best):
            raise Failure(f"{best} is damaged (its sha256 differs): delete {work.path} and train again")
        model.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
    return Trained(model, history, state)


def kept_row(config: Config, rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The history's row of the epoch whose weights are kept: the last one, or the one that `monitor` liked most."""
    monitor, mode = config.trainer.monitor, monitor_direction(config)
    rated = [row for row in rows if monitor in row] if config.trainer.keep == "best" else []
    return (max if mode == "max" else min)(rated, key=lambda row: row[monitor]) if rated else rows[-1]


def _unheard(metrics: Mapping[str, float], step: int) -> None:
    """Where the metrics of all processes but the first go."""
