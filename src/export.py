"""Stage `export`: an ONNX model that answers as the original does, with all that is needed to call it beside it.

    python -m src.export -cp ../experiments/cifar10_resnet -cn config      (what DVC runs)

Writes `export/`: model.onnx, model.safetensors, signature.json (what `src.predict` reads), README.md (the model card);
with `export.int8=true` model.int8.onnx as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.files import sha256_of, write_text_atomically
from src.configuration.command import main
from src.configuration.schema import Config

if TYPE_CHECKING:
    from src.exporting.card import Card
    from src.tasks import Task


def export(config: Config) -> None:
    """Exports, compares with the original on real inputs at several sizes, and measures the latency.

    All on the CPU, where ONNX Runtime computes, also after a training on a GPU, as a line then says.

    Raises:
        Failure: there is no trained model, the exported one answers differently, or it can't be had in int8; then
            nothing of it is left in `export/`.
    """
    import shutil

    from src import tasks
    from src.common.console import console
    from src.common.hardware import device_of
    from src.data import packed
    from src.data.batching import batches, spread
    from src.exporting import card, onnx_export, quantization
    from src.models import weights
    from src.reporting import plots, tables
    from src.tracking.journal import stage_journal
    from src.tracking.tracker import RunInfo, Tracker
    from src.training import determinism

    determinism.fix(config.seed, config.trainer.threads)
    meta = packed.read_meta(config.processed)
    model = weights.load(config.model, meta, config.folder / "train")
    if device_of(config.trainer.accelerator).type != "cpu":
        console.print("exported, compared and timed on the CPU, where ONNX Runtime computes")
    note = weights.read_note(config.folder / "train")
    journal = stage_journal(config.name, "export")
    with Tracker.join(
        journal, RunInfo(config.name, config.run_name, is_tracked=config.tracking), note["sha256"]
    ) as tracker:
        name, task = tasks.of(config)
        inputs = task.inputs(meta["kind"])

        def examples_of(split: str) -> list[Any]:
            split_batches = spread(batches(config.processed, split, config.loader, train=False), onnx_export.EXAMPLES)
            return onnx_export.example_inputs(inputs, task.batches(model, split_batches))

        examples = examples_of("val")

        folder = config.folder / "export"
        building = config.folder / ".export"  # replaces the last good export only when it is complete
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        graph, int8 = building / "model.onnx", building / "model.int8.onnx"
        onnx_export.write(model, inputs, task.outputs, examples, graph)
        difference = onnx_export.largest_difference(
            model, inputs, examples, graph, config.export.tolerance, task.difference
        )
        signature = {
            "name": config.name,
            "profile": config.profile.name,
            "task": name,
            "kind": meta["kind"],
            **task.signature(model, meta, config),
            "sha256": sha256_of(graph),
        }
        cost: dict[str, float] = {}
        if config.export.int8:
            quantization.write_int8(graph, inputs, examples_of("train"), int8)
            val = batches(config.processed, "val", config.loader, train=False)
            cost = quantization.cost(graph, int8, inputs, task.batches(model, val), task.int8_figures)
            signature |= {"int8_sha256": sha256_of(int8)}
        shutil.copyfile(config.folder / "train" / weights.NAME, building / weights.NAME)
        write_text_atomically(building / "signature.json", json.dumps(signature, indent=1, ensure_ascii=False) + "\n")
        fields = _card(config, meta, task, signature, note["epochs"], difference, cost, building)
        write_text_atomically(building / "README.md", card.model_card(fields))
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
        print(f"largest difference to PyTorch on real inputs: {difference:.2e}", flush=True)
        if cost:
            print(_in_int8(cost), flush=True)

        graphs = {"onnxruntime": folder / graph.name} | ({"int8": folder / int8.name} if cost else {})
        rows = onnx_export.latency(model, inputs, examples, graphs, config.export)
        table = tables.markdown(rows, list(rows[0]))
        # Times differ from run to run: this table stands beside DVC's outputs, not in them.
        page = f"One thread, milliseconds a batch, this machine.\n\n{table}"
        write_text_atomically(config.folder / "latency.md", page)
        print(table, flush=True)
        plots.latency(rows, config.folder / "latency.png", label=config.label, sample=config.sample)
        tracker.log_artifact(folder, "export")
        tracker.log_artifact(config.folder / "latency.md", "export")
        tracker.log_artifact(config.folder / "latency.png", "plots")
        example = inputs.trimmed(*(value[:1] for value in examples[0]))
        tracker.log_model(folder / graph.name, config.name, onnx_export.feed(inputs, example))
        tracker.log_metrics({"onnx_largest_difference": difference} | cost, step=0)
        times = [(row["batch"], key, row[key]) for row in rows for key in row if key.endswith("_ms")]
        tracker.log_metrics({f"{key}_batch{size}": value for size, key, value in times}, step=0)


def _in_int8(cost: Mapping[str, float]) -> str:
    """What int8 costs, in a sentence."""
    sentence = f"In int8 the answers differ from the fp32 graph's by {cost['int8_difference']:.1e} on average"
    for name in [key.removesuffix("_int8") for key in cost if key.endswith("_int8")]:
        sentence += f"; {name} is {cost[f'{name}_int8']:.4g}, the fp32 graph's {cost[f'{name}_onnx']:.4g}"
    return f"{sentence}."


def _card(
    config: Config,
    meta: Mapping[str, Any],
    task: Task,
    signature: Mapping[str, Any],
    epochs: int,
    difference: float,
    cost: Mapping[str, float],
    folder: Path,
) -> Card:
    from src.exporting.card import Card

    evaluated = config.folder / "metrics.json"
    metrics = json.loads(evaluated.read_text()) if evaluated.exists() else {}
    limits = [
        f"Answers differ from PyTorch's by at most {difference:.0e} on real inputs of several sizes.",
        *([_in_int8(cost)] if cost else []),
        f"Trained on {meta['source']['origin']} data alone: it knows no other kind of input.",
    ]
    return Card(
        title=config.name,
        summary=config.description,
        hub_tag=task.hub_tag(signature),
        dataset=config.data.name,
        profile=config.profile.name,
        counts={split: entry["examples"] for split, entry in meta["splits"].items()},
        source=meta["source"]["origin"],
        source_sha256=meta["source"]["sha256"],
        config=config.settings(),
        seed=config.seed,
        epochs=epochs,
        metrics={key: value for key, value in metrics.items() if isinstance(value, int | float)},
        folder=f"{config.output}/export",
        arguments=task.example_arguments(signature),
        snippet=task.snippet(signature),
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        limits=limits,
    )


if __name__ == "__main__":
    main(export)()
