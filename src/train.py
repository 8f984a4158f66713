"""Stage `train`: weights, history and metrics of one run.

    python -m src.train +experiment=cifar10_resnet model.optimizer.lr=0.1      straight from conf/
    python -m src.train -cp ../experiments/cifar10_resnet -cn config           what DVC runs

    python -m src.train -m '+experiment=glob(mnist_*)' seed=0,1                several runs; also lists and range(0,5)
    python -m src.train +experiment=cifar10_resnet trainer=ddp                 two processes; or by torchrun, srun

The same command goes on with a run that was interrupted. A direct run writes to experiments/runs/, never into DVC's
outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.console import console
from src.common.dvc_stage import is_dvc_stage
from src.common.garbage import collector_paused
from src.common.hardware import keep_freed_memory, release_freed_memory
from src.common.run_folder import RunFolder
from src.common.yaml_files import dump_yaml
from src.configuration.command import main
from src.configuration.composing import write_resolved
from src.configuration.schema import Config
from src.tracking.journal import shorten
from src.training.launcher import check_processes, read_launch

if TYPE_CHECKING:
    import numpy as np

    from src.tracking.tracker import Tracker
    from src.training.run import Trained


def train(config: Config) -> None:
    """Trains and writes `train/` into the run's folder: model.safetensors, model.json, history.csv, metrics.json.

    Raises:
        Failure: the data can't be prepared; the same run is under way, or another one into the same folder.
    """
    with collector_paused():
        import torch

        from src import tasks
        from src.data import packed
        from src.data.preparing import prepared
        from src.reporting import tables
        from src.tracking.provenance import dirty_patch
        from src.tracking.run_facts import data_report, run_datasets, run_description, run_parameters, run_tags
        from src.tracking.tracker import CONFIG, PATCH, RunInfo, Tracker
        from src.training import determinism, run
        from src.training.checkpoints import lock_folder
        from src.training.progress import Progress
        from src.training.start import weights_tags, with_weights

    keep_freed_memory()
    config = with_weights(prepared(config))
    determinism.fix(config.seed, config.trainer.threads_each)
    meta = packed.read_meta(config.processed)
    work, folder = run.work_folder(config, meta), RunFolder(config.folder)
    info = RunInfo(
        experiment=config.name,
        name=" ".join([*_changed_keys(), config.run_name]),
        params=run_parameters(config),
        tags=run_tags(config, meta, fingerprint=work.key, threads=torch.get_num_threads()) | weights_tags(config),
        description=run_description(config),
        is_tracked=config.tracking,
    )
    with (
        work.locked(),
        lock_folder(folder.lock, f"another run into {config.output}"),
        Tracker.resume(work.journal, info) as tracker,
    ):
        tracker.log_text(dump_yaml(config.record()), CONFIG)
        tracker.log_datasets(run_datasets(config, meta, "train", "val"))
        if page := data_report(config, meta):
            tracker.log_artifact(page, "data")
        tracker.sample_system()
        if patch := dirty_patch():
            tracker.log_text(patch, PATCH)
        _, task = tasks.of(config)
        progress = Progress(folder.progress, task.showcase, partial(_draw, config, tracker))
        trained = run.fit(config, meta, work, tracker.log_metrics, [progress])
        release_freed_memory()
        sha256 = _write(config, folder, trained)
        _track(config, folder, trained, sha256, tracker, task.remark(trained.history.rows))
        tables.write_metrics(folder.training_time, {"seconds": trained.history.seconds, "sha256": sha256})
        console.print(f"trained in {trained.history.seconds:.1f} s: {config.output}/train")
    work.remove_checkpoints()


def refuse(config: Config) -> None:
    """Refuses what this machine, or the launcher that started this process, does not have.

    Raises:
        ConfigError: a GPU is asked for and there is none; a launcher started another number of processes.
    """
    check_processes(config.trainer)
    with collector_paused():
        from src.training.trainer import require_gpus
    require_gpus(config.trainer)


def _draw(config: Config, tracker: Tracker, columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Draws a model's images (uint8 [K, H, W, C] by title) and adds the picture to the run in MLflow."""
    from src.reporting import plots

    title: dict[str, Any] = {"label": f"{config.label} · {path.stem.replace('_', ' ')}", "sample": config.sample}
    if len(columns) == 1:
        (images,) = columns.values()
        plots.samples(images, path, **title)
    else:
        plots.image_grid(columns, path, **title)
    tracker.log_artifact(path, path.parent.name)


def _changed_keys() -> list[str]:
    """The command line's overrides in short, which distinguish runs in MLflow's list; none under DVC."""
    from hydra.core.hydra_config import HydraConfig

    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    values: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        values[key] = value.strip("\"'")
    hidden = ("experiment", "profile", "seed", "output", "data.archive", "data.sha256", "tracking")
    # MLflow's column shows the first twenty letters: single keys before whole groups.
    keys = sorted(
        (key for key in values if key not in hidden and not key.startswith("tags.")), key=lambda key: "." not in key
    )
    words = [f"{key.rpartition('.')[2]}={values[key]}" if "." in key else values[key] for key in keys]
    return [shorten(re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.4g}", word), 40) for word in words][:6]


def _write(config: Config, folder: RunFolder, trained: Trained) -> str:
    """Writes what DVC hashes (no times, no run ids), the completion marker model.json last.

    Returns the weights' sha256.
    """
    from src.models import weights
    from src.reporting import tables
    from src.training.run import kept_row

    if not is_dvc_stage():  # there, it is compose's output
        write_resolved(folder.config, config.record())
    folder.train.mkdir(parents=True, exist_ok=True)
    rows = trained.history.rows
    kept = kept_row(config, rows)
    tables.write_csv(folder.history, rows)
    tables.write_metrics(folder.train_metrics, {"profile": config.profile.name, **kept})
    return weights.save(
        trained.model,
        folder.train,
        epochs=len(rows),
        kept_epoch=int(kept["epoch"]),
        optimizer_sha256=trained.optimizer_sha256,
    )


def _track(
    config: Config, folder: RunFolder, trained: Trained, sha256: str, tracker: Tracker, remark: str | None
) -> None:
    """Adds the results to the run in MLflow, with the task's remark on them, such as a generator's collapse."""
    from src.tracking.run_facts import run_description
    from src.tracking.tracker import DESCRIPTION, MODEL_TAG, STATE_TAG

    if remark:
        tracker.set_tags({DESCRIPTION: f"{run_description(config)}\n\n{remark}"})
        console.print(remark)
    tracker.set_tags({MODEL_TAG: sha256, STATE_TAG: trained.optimizer_sha256})
    tracker.log_metrics({"train_seconds": trained.history.seconds}, step=0)
    tracker.log_artifact(folder.history)


def command() -> None:
    """The command, alone or as one of the processes that torchrun or srun started, of which the first is the run."""
    launch = read_launch()
    if launch is None:
        main(train, refuse=refuse)()
        return
    with collector_paused():
        from src.training import ranks
        from src.training.follower_main import follow

    with ranks.launched_group(launch):
        if launch.rank:
            follow()
        else:
            main(train, refuse=refuse, goes_on=False)()


if __name__ == "__main__":
    command()
