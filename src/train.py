"""Stage `train`: weights, history and metrics of one run.

    python -m src.train +experiment=cifar10_resnet model.optimizer.lr=0.1      straight from conf/
    python -m src.train -cp ../experiments/cifar10_resnet -cn config           what DVC runs

The same command goes on with a run that was interrupted. A direct run writes to experiments/runs/, never into DVC's
outputs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock

from src.config import ROOT, Config, DataConfig, main, plain, write_resolved
from src.errors import Failure

if TYPE_CHECKING:
    import numpy as np
    from pytorch_lightning import Callback

    from src.training.checkpoints import WorkFolder
    from src.training.history import History, LogMetrics
    from src.training.tracking import Tracker


def train(config: Config) -> None:
    """Trains and writes `train/` into the run's folder: model.safetensors, model.json, history.csv, metrics.json.

    Raises:
        ConfigError: a GPU is asked for and there is none.
        Failure: the data can't be prepared; the same run is under way, or another one into the same folder.
    """
    from src.training import startup

    startup.import_lightning()
    startup.keep_memory()

    from src.training.trainer import require_gpus

    require_gpus(config.trainer)
    config = prepared(config)

    import torch
    from lightning_utilities.core.rank_zero import rank_zero_only

    from src.data import packed
    from src.training import checkpoints, determinism

    determinism.fix(config.seed, config.trainer.threads)
    meta = packed.read_meta(config.processed)
    sections = {key: value for key, value in config.plain().items() if key in ("seed", "model", "trainer")}
    identity = checkpoints.identity(sections | {"loader": plain(config.loader)}, meta["splits"])
    work = checkpoints.WorkFolder(config.name, identity)
    # Another process of the same run: the first one reports and writes. Lightning sets the attribute on import.
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        _fit(config, meta, work, _unheard)
        return

    from src.training.progress import Progress
    from src.training.provenance import dirty_patch, environment
    from src.training.tracking import CONFIG, DATA_TAG, DESCRIPTION, MODEL_TAG, PATCH, STATE_TAG, Tracker

    with work.held(), checkpoints.held(config.folder / ".held", f"another run into {config.output}"):
        threads, device = torch.get_num_threads(), config.trainer.accelerator
        tags = environment(device=device, threads=threads) | {
            "pipeline.profile": config.profile.name,
            "pipeline.fingerprint": work.key,
            **{DATA_TAG + split: packed["sha256"] for split, packed in meta["splits"].items()},
            "pipeline.output": config.output,
        }
        note = f"{config.description} ({config.profile.note})"
        with Tracker.resume(
            journal=work.journal,
            experiment=config.name,
            name=config.run_name,
            params=config.plain(),
            tags=tags,
            description=note,
        ) as tracker:
            tracker.log_text(yaml.safe_dump(config.plain(), sort_keys=False), CONFIG)
            if patch := dirty_patch():
                tracker.log_text(patch, PATCH)
            progress = Progress(config.folder / "progress", partial(_draw, config, tracker))
            model, history, state = _fit(config, meta, work, tracker.log_metrics, [progress])
            # What the run's summary must not leave out, such as a generator's collapse.
            if hasattr(model, "remark") and (remark := model.remark(history.rows)):
                tracker.set_tags({DESCRIPTION: f"{note}\n\n{remark}"})
                print(remark, flush=True)
            tracker.set_tags({MODEL_TAG: _write(config, model, history, state), STATE_TAG: state})
            tracker.log_metrics({"train_seconds": history.seconds}, step=0)
            tracker.log_artifact(config.folder / "train" / "curves.png", "plots")
            tracker.log_artifact(config.folder / "train" / "history.csv")
            if not (config.folder / "config.yaml").exists():  # a direct run's: evaluate and export are called on it
                write_resolved(config.folder / "config.yaml", config.plain())
            print(f"trained in {history.seconds:.1f} s: {config.output}/train", flush=True)
        work.forget()


def _fit(
    config: Config,
    meta: dict[str, Any],
    work: WorkFolder,
    log_metrics: LogMetrics,
    callbacks: Sequence[Callback] = (),
) -> tuple[Any, History, str]:
    """Trains from the start, or from where the work folder's checkpoint stands.

    Returns the model, its history, and the sha256 of the optimizers' last state.
    """
    import torch
    from pytorch_lightning.trainer.states import TrainerStatus

    from src.data import packed
    from src.data.batching import PackedData
    from src.training.checkpoints import is_whole
    from src.training.determinism import sha256_of_state
    from src.training.history import History, on_terminal
    from src.training.interruption import Interruption
    from src.training.trainer import BEST, adapt, build_trainer

    history = History(log_metrics, lines=not on_terminal() and log_metrics is not _unheard)
    data = PackedData(config.processed, config.loader, config.seed, same_batches=config.trainer.overfit_batches > 0)
    model = config.model(meta)
    interruption = Interruption()
    trainer = build_trainer(config, model, history, work.path, interruption, callbacks)
    checkpoint = work.resumable()
    if checkpoint:
        print(f"goes on with the run that was interrupted ({checkpoint.relative_to(ROOT)})", flush=True)
    elif hasattr(model, "prepare"):
        model.prepare(packed.read_split(config.processed, "train")["images"][:5000])
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
        if not is_whole(best):
            raise Failure(f"{best} is damaged (its sha256 differs): delete {work.path} and train again")
        model.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
    return model, history, state


def _draw(config: Config, tracker: Tracker, columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Draws what a model makes of the same examples (or of nothing) each time, and adds it to the run in MLflow."""
    from src.reporting import plots

    title: dict[str, Any] = {"label": f"{config.label} · {path.stem.replace('_', ' ')}", "sample": config.sample}
    if len(columns) == 1:
        (images,) = columns.values()
        plots.samples(images, path, **title)
    else:
        plots.image_grid(columns, path, **title)
    tracker.log_artifact(path, path.parent.name)


def _unheard(metrics: Mapping[str, float], step: int) -> None:
    """Where the metrics of all processes but the first go."""


def _write(config: Config, model: Any, history: History, state: str) -> str:
    """Writes what DVC hashes (no times, no run ids), the completion marker model.json last.

    Returns the weights' sha256.
    """
    from src.models import weights
    from src.reporting import plots, tables

    folder = config.folder / "train"
    folder.mkdir(parents=True, exist_ok=True)
    tables.write_csv(folder / "history.csv", history.rows)
    rows = history.rows
    best = rows[-1]
    if config.trainer.keep == "best":
        rated = [row for row in rows if config.trainer.monitor in row]
        best = (
            (max if config.trainer.mode == "max" else min)(rated, key=lambda row: row[config.trainer.monitor])
            if rated
            else best
        )
    tables.write_metrics(folder / "metrics.json", {"profile": config.profile.name} | best)
    plots.training_curves(rows, folder / "curves.png", label=config.label, sample=config.sample)
    return weights.save(model, folder, epochs=len(rows), kept_epoch=int(best["epoch"]), optimizer_sha256=state)


def prepared(config: Config) -> Config:
    """The configuration with the folder of the data that it asks for.

    That is DVC's, if it was packed with this very configuration. Otherwise the run's own, in data/direct/, which is
    made by the download and preprocess stages where it is not there: what DVC made is never overwritten by a direct
    run.

    Raises:
        Failure: a stage failed; it has said why.
    """
    from src.data import packed

    def fits(candidate: Config) -> bool:
        folder = candidate.processed
        return (folder / "meta.json").is_file() and packed.read_meta(folder)["config"] == config.packing

    if fits(config):
        return config
    digest = hashlib.sha256(json.dumps(config.packing, sort_keys=True).encode()).hexdigest()[:8]
    own = config.model_copy(update={"data_folder": f"data/direct/{digest}"})
    folder = ROOT / own.data_folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not fits(own):
            write_resolved(folder / "config.yaml", {key: plain(getattr(own, key)) for key in DataConfig.model_fields})
            for stage in ("download", "preprocess"):
                command = [sys.executable, "-m", f"src.{stage}", "-cp", str(folder), "-cn", "config"]
                if subprocess.run(command, cwd=ROOT).returncode:
                    raise Failure(f"the data of {config.data.name} could not be prepared: {stage} failed, see above")
    return own


if __name__ == "__main__":
    main(train)()
