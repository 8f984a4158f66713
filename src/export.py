"""Stage `export`: an ONNX model that answers as the original does, with all that is needed to call it beside it.

    python -m src.export -cp ../experiments/cifar10_resnet -cn config      (what DVC runs)

Writes `export/`: model.onnx, model.safetensors, signature.json (what `src.predict` reads), README.md (the model card);
with `export.int8=true` model.int8.onnx as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from src.common.files import sha256_of
from src.configuration.command import main
from src.configuration.schema import Config


def export(config: Config) -> None:
    """Exports, compares with the original on real inputs at several sizes, and measures the latency.

    Raises:
        Failure: there is no trained model, the exported one answers differently, or it can't be had in int8; then
            nothing of it is left in `export/`.
    """
    import shutil

    from src.data import packed
    from src.data.batching import batches
    from src.exporting import card, onnx_export, quantization
    from src.models import weights
    from src.reporting import plots, tables
    from src.tracking.journal import stage_journal
    from src.tracking.tracker import RunInfo, Tracker
    from src.training import determinism

    determinism.fix(config.seed, config.trainer.threads)
    meta = packed.read_meta(config.processed)
    model = weights.load(config.model, meta, config.folder / "train")
    note = weights.read_note(config.folder / "train")
    journal = stage_journal(config.name, "export")
    with Tracker.join(journal, RunInfo(config.name, config.run_name), note["sha256"]) as tracker:
        val = batches(config.processed, "val", config.loader, train=False)
        inputs, examples = onnx_export.given_to(model, meta["kind"], val)

        folder = config.folder / "export"
        building = config.folder / ".export"  # replaces the last good export only when it is whole
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        whole, int8 = building / "model.onnx", building / "model.int8.onnx"
        onnx_export.write(model, inputs, examples, whole, opset=config.export.opset)
        difference = onnx_export.largest_difference(model, inputs, examples, whole, config.export.tolerance)
        called = signature(config, meta, model) | {"sha256": sha256_of(whole)}
        cost: dict[str, float] = {}
        if config.export.int8:
            train = batches(config.processed, "train", config.loader, train=False)
            quantization.write_int8(whole, inputs, onnx_export.given_to(model, meta["kind"], train)[1], int8)
            answered = examples if model.task == "generation" else val
            cost = quantization.cost(whole, int8, inputs, answered, model.task)
            called |= {"int8_sha256": sha256_of(int8)}
        shutil.copyfile(config.folder / "train" / weights.NAME, building / weights.NAME)
        (building / "signature.json").write_text(json.dumps(called, indent=1, ensure_ascii=False) + "\n")
        text = card.model_card(_card(config, meta, model, note, difference, cost, building))
        (building / "README.md").write_text(text)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
        print(f"largest difference to PyTorch on real inputs: {difference:.2e}", flush=True)
        if cost:
            print(_in_int8(cost), flush=True)

        graphs = {"onnxruntime": folder / whole.name} | ({"int8": folder / int8.name} if cost else {})
        rows = onnx_export.latency(model, inputs, examples, graphs, config.export)
        table = tables.markdown(rows, list(rows[0]))
        # Times differ from run to run: this table stands beside DVC's outputs, not in them.
        (config.folder / "latency.md").write_text(f"One thread, milliseconds a batch, this machine.\n\n{table}")
        print(table, flush=True)
        plots.latency(rows, config.folder / "latency.png", label=config.label, sample=config.sample)
        tracker.log_artifact(folder, "export")
        tracker.log_artifact(config.folder / "latency.md", "export")
        tracker.log_artifact(config.folder / "latency.png", "plots")
        tracker.log_metrics({"onnx_largest_difference": difference} | cost, step=0)
        times = [(row["batch"], key, row[key]) for row in rows for key in row if key.endswith("_ms")]
        tracker.log_metrics({f"{key}_batch{size}": value for size, key, value in times}, step=0)


def signature(config: Config, meta: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What calling the model needs beside the graph.

    Task, kind of data, classes, sizes; for texts tokenizer and vocabulary.
    """
    known = {key: meta[key] for key in ("kind", "classes", "shape", "tokenizer", "vocabulary") if key in meta}
    if model.task == "generation":
        known |= {"latent": model.latent}
    about = {"name": config.name, "profile": config.profile.name, "task": model.task}
    return about | {"max_tokens": config.loader.max_tokens} | known


def _in_int8(cost: Mapping[str, float]) -> str:
    """What int8 costs, in a sentence."""
    said = f"In int8 the answers differ from the fp32 graph's by {cost['int8_difference']:.1e} on average"
    for name in [key.removesuffix("_int8") for key in cost if key.endswith("_int8")]:
        said += f"; {name} is {cost[f'{name}_int8']:.4g}, the fp32 graph's {cost[f'{name}_onnx']:.4g}"
    return f"{said}."


def _card(
    config: Config,
    meta: Mapping[str, Any],
    model: Any,
    note: Mapping[str, Any],
    difference: float,
    cost: Mapping[str, float],
    folder: Any,
) -> Any:
    from src.exporting.card import Card

    evaluated = config.folder / "metrics.json"
    metrics = json.loads(evaluated.read_text()) if evaluated.exists() else {}
    hub = {  # the hub's names
        "classification": "text-classification" if meta["kind"] == "text" else "image-classification",
        "translation": "image-to-image",
        "reconstruction": "image-to-image",
        "generation": "unconditional-image-generation",
    }
    limits = [
        f"Answers differ from PyTorch's by at most {difference:.0e} on real inputs of several sizes.",
        *([_in_int8(cost)] if cost else []),
        f"Trained on {meta['source']['origin']} data alone: it knows no other kind of input.",
    ]
    return Card(
        title=config.name,
        summary=config.description,
        task=hub[model.task],  # type: ignore[arg-type]
        dataset=config.data.name,
        profile=config.profile.name,
        counts={split: facts["examples"] for split, facts in meta["splits"].items()},
        source=meta["source"]["origin"],
        source_sha256=meta["source"]["sha256"],
        config={key: value for key, value in config.plain().items() if key != "output"},
        seed=config.seed,
        epochs=note["epochs"],
        metrics={key: value for key, value in metrics.items() if isinstance(value, int | float)},
        folder=f"{config.output}/export",
        image_shape=tuple(meta.get("shape", (0, 0, 0))),
        latent=getattr(model, "latent", 0),
        classes=meta.get("classes", []),
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        limits=limits,
    )


if __name__ == "__main__":
    main(export)()
