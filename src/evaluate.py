"""Stage `evaluate`: the test split's metrics, plots and pictures. Nothing else touches the test split.

python -m src.evaluate -cp ../experiments/cifar10_resnet -cn config        (what DVC runs)
python -m src.evaluate -cp ../experiments/runs/NAME/RUN -cn config         a direct run
"""

from __future__ import annotations

from src.configuration.command import main
from src.configuration.schema import Config


def evaluate(config: Config) -> None:
    """Writes metrics.json, confusion.csv and `evaluation/` into the run's folder and adds them to the run in MLflow.

    `evaluation/` holds the task's pictures and the training's curves.

    Raises:
        Failure: there is no trained model, or the model or the data is damaged.
    """
    from src import tasks
    from src.common.hardware import device_here
    from src.data import packed
    from src.data.batching import batches
    from src.models import weights
    from src.reporting import plots, tables
    from src.tracking.journal import stage_journal
    from src.tracking.run_facts import run_datasets
    from src.tracking.tracker import RunInfo, Tracker
    from src.training import determinism

    determinism.fix(config.seed, config.trainer.threads)
    meta = packed.read_meta(config.processed)
    device = device_here(config.trainer.accelerator)
    model = weights.load(config.model, meta, config.folder / "train").to(device)
    test = batches(config.processed, "test", config.loader, train=False).to(device)
    _, task = tasks.of(config)
    folder = config.folder / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    # Joined first, so that MLflow's import overlaps with the work.
    sha256 = weights.read_note(config.folder / "train")["sha256"]
    journal = stage_journal(config.name, "evaluate")
    info = RunInfo(config.name, config.run_name, is_tracked=config.tracking)
    with Tracker.join(journal, info, sha256) as tracker:
        tracker.log_datasets(run_datasets(config, meta, "test"))
        evaluated = task.evaluate(model, test, config, meta, folder)
        metrics = evaluated.metrics
        tables.write_csv(config.folder / "confusion.csv", evaluated.pairs)
        tables.write_metrics(
            config.folder / "metrics.json", {"profile": config.profile.name, **evaluated.options, **metrics}
        )
        history = tables.read_csv(config.folder / "train" / "history.csv")
        plots.curves(history, task.metrics, folder / "curves.png", label=config.label, sample=config.sample)

        tracker.log_metrics({f"test_{name}": value for name, value in metrics.items()}, step=0)
        tracker.log_artifact(folder, "evaluation")
        tracker.log_artifact(config.folder / "metrics.json")
    print("\n".join(f"{name:32} {value:.4g}" for name, value in metrics.items()), flush=True)


if __name__ == "__main__":
    main(evaluate)()
