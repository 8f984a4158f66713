"""The model card: what a model was made from, how good it is and how to call it, in one markdown page.

The page depends on its fields alone (no dates, hosts or run ids), so that DVC can hash it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.common.yaml_files import dump_yaml
from src.reporting.plots import SAMPLE_NOTE
from src.reporting.tables import markdown


@dataclass(frozen=True)
class Card:
    """The fields of a model card."""

    title: str
    summary: str  # one line
    hub_tag: str  # the hub's name for the task, its `pipeline_tag`
    dataset: str
    profile: str
    counts: Mapping[str, int]  # split -> examples
    source: str  # where the data came from
    source_sha256: str
    config: Mapping[str, Any]  # resolved: plain dicts, lists and scalars
    seed: int
    epochs: int
    metrics: Mapping[str, float]  # on the test split
    folder: str  # relative to the repository; holds model.onnx
    arguments: str  # of `python -m src.predict FOLDER`, in an example
    snippet: str  # Python that calls `session`, an ONNX Runtime session of the model
    files: Mapping[str, str]  # name -> sha256
    limits: Sequence[str]  # a sentence each


def model_card(card: Card) -> str:
    """The card as markdown with the hub's front matter; ends with a newline."""
    warning = f"> **{SAMPLE_NOTE}**: the figures show that the pipeline runs, not how good the model is."
    sections = [
        f"---\nlibrary_name: onnx\npipeline_tag: {card.hub_tag}\n---",
        f"# {card.title}\n\n{card.summary}",
        *([warning] if card.profile == "sample" else []),
        f"## Data\n\n{_data(card)}",
        f"## Training\n\n{_training(card)}",
        f"## Metrics\n\nOn the test split.\n\n{_table('metric', 'value', card.metrics)}",
        f"## How to call it\n\n{_calling(card)}",
        f"## Files\n\n{_table('file', 'sha256', card.files)}",
        "## Limits\n\n" + "\n".join(f"* {sentence}" for sentence in card.limits),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _table(name: str, value: str, items: Mapping[str, Any]) -> str:
    return markdown([{name: key, value: item} for key, item in items.items()], [name, value])


def _data(card: Card) -> str:
    counts = _table("split", "examples", card.counts)
    source = f"Source: {card.source}, sha256 `{card.source_sha256}`."
    return f"{card.dataset}, profile `{card.profile}`.\n\n{counts}\n{source}"


def _training(card: Card) -> str:
    config = dump_yaml(dict(card.config), allow_unicode=True)
    return (
        f"Seed {card.seed}, epochs: {card.epochs}.\n\n"
        f"<details><summary>The resolved configuration</summary>\n\n```yaml\n{config}```\n\n</details>"
    )


def _calling(card: Card) -> str:
    return (
        f"```sh\npython -m src.predict {card.folder} {card.arguments}\n```\n\n"
        "Or without this repository, with ONNX Runtime alone:\n\n```python\nimport numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{card.folder}/model.onnx")\n{card.snippet}```'
    )
