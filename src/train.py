"""Stage `train`: weights, history and metrics of one run.

    python -m src.train +experiment=cifar10_resnet model.optimizer.lr=0.1      straight from conf/
    python -m src.train -cp ../experiments/cifar10_resnet -cn config           what DVC runs

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

import yaml

from src.configuration.command import main
from src.configuration.composing import write_resolved
from src.configuration.schema import Config
from src.tracking.journal import shorten
from src.training import startup

if TYPE_CHECKING:
    import numpy as np

    from src.tracking.tracker import Tracker
    from src.training.run import Trained


def train(config: Config) -> None:
    """Trains and writes `train/` into the run's folder: model.safetensors, model.json, history.csv, metrics.json.

    Raises:
        ConfigError: a GPU is asked for and there is none; a launcher started another number of processes.
        Failure: the data can't be prepared; the same run is under way, or another one into the same folder.
    """
    from src.training import launcher

    launcher.refuse(config.trainer)
    startup.import_lightning()

    from src.common.hardware import hand_back_memory, keep_memory
    from src.data.preparing import prepared
    from src.training.trainer import require_gpus

    keep_memory()
    require_gpus(config.trainer)
    config = prepared(config)

    from src import tasks
    from src.data import packed
    from src.tracking.provenance import dirty_patch
    from src.tracking.tracker import CONFIG, DESCRIPTION, MODEL_TAG, PATCH, STATE_TAG, Tracker
    from src.training import determinism, run
    from src.training.checkpoints import held
    from src.training.progress import Progress

    determinism.fix(config.seed, config.trainer.threads_each)
    meta = packed.read_meta(config.processed)
    work = run.work_folder(config, meta)
    with work.held(), held(config.folder / ".held", f"another run into {config.output}"):
        with Tracker.resume(
            journal=work.journal,
            experiment=config.name,
            name=" ".join([*_changes(), config.run_name]),
            params=run.parameters(config),
            tags=run.tags(config, meta, work),
            description=run.note(config),
        ) as tracker:
            tracker.log_text(yaml.safe_dump(config.plain(), sort_keys=False), CONFIG)
            if patch := dirty_patch():
                tracker.log_text(patch, PATCH)
            _, task = tasks.of(config)
            progress = Progress(config.folder / "progress", task.showcase, partial(_draw, config, tracker))
            trained = run.fit(config, meta, work, tracker.log_metrics, [progress])
            hand_back_memory()  # what draws and sends brings its own
            # What the run's summary must not leave out, such as a generator's collapse.
            if remark := task.remark(trained.history.rows):
                tracker.set_tags({DESCRIPTION: f"{run.note(config)}\n\n{remark}"})
                print(remark, flush=True)
            tracker.set_tags({MODEL_TAG: _write(config, trained), STATE_TAG: trained.state})
            tracker.log_metrics({"train_seconds": trained.history.seconds}, step=0)
            tracker.log_artifact(config.folder / "train" / "curves.png", "plots")
            tracker.log_artifact(config.folder / "train" / "history.csv")
            if not (config.folder / "config.yaml").exists():  # a direct run's: evaluate and export are called on it
                write_resolved(config.folder / "config.yaml", config.plain())
            print(f"trained in {trained.history.seconds:.1f} s: {config.output}/train", flush=True)
        work.forget()


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


def _changes() -> list[str]:
    """What the command line changed, in short, so that runs tell themselves apart in MLflow's list; of DVC nothing."""
    from hydra.core.hydra_config import HydraConfig

    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    pairs = dict(word.lstrip("+").partition("=")[::2] for word in given)
    hidden = ("experiment", "profile", "seed", "output", "data.archive", "data.sha256")
    # MLflow's column shows the first twenty letters: single keys before whole groups.
    keys = sorted((key for key in pairs if key not in hidden), key=lambda key: "." not in key)
    said = [f"{key.rpartition('.')[2]}={pairs[key]}" if "." in key else pairs[key] for key in keys]
    return [shorten(re.sub(r"\d+\.\d{4,}", lambda found: f"{float(found[0]):.4g}", word), 40) for word in said][:6]


def _write(config: Config, trained: Trained) -> str:
    """Writes what DVC hashes (no times, no run ids), the completion marker model.json last.

    Returns the weights' sha256.
    """
    from src.configuration.declarations import metrics_of
    from src.models import weights
    from src.reporting import plots, tables
    from src.training.run import kept_row

    folder = config.folder / "train"
    folder.mkdir(parents=True, exist_ok=True)
    rows = trained.history.rows
    kept = kept_row(config, rows)
    tables.write_csv(folder / "history.csv", rows)
    tables.write_metrics(folder / "metrics.json", {"profile": config.profile.name, **kept})
    plots.curves(rows, metrics_of(config), folder / "curves.png", label=config.label, sample=config.sample)
    return weights.save(
        trained.model, folder, epochs=len(rows), kept_epoch=int(kept["epoch"]), optimizer_sha256=trained.state
    )


def command() -> None:
    """The command, as one process or as one of those that torchrun or srun started: the first of them is the run."""
    from src.training.launcher import launch

    place = launch()
    if place is None:
        main(train)()
        return

    startup.import_lightning()

    from src.training import follower, ranks

    with ranks.joined(place):
        if place.rank:
            follower.follow()
        else:
            main(train)()


if __name__ == "__main__":
    command()
    startup.leave()
