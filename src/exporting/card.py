"""The model card: what a model was made from, how good it is and how to call it, in one markdown page.

The page depends on its fields alone (no dates, hosts or run ids), so that DVC can hash it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from src.reporting.plots import SAMPLE_NOTE
from src.reporting.tables import markdown

Task = Literal["image-classification", "text-classification", "image-to-image", "unconditional-image-generation"]

READ_IMAGE = """\
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{folder}/model.onnx")
photo = Image.open("input.png").convert("{mode}").resize(({width}, {height}))
image = np.asarray(photo).reshape({height}, {width}, {channels}).transpose(2, 0, 1)[None]  # uint8 [1, {channels}, ...]
"""
WRITE_IMAGE = """\
Image.fromarray((255 * output[0]).round().astype(np.uint8).transpose(1, 2, 0).squeeze()).save("output.png")
"""
SNIPPETS: dict[Task, str] = {
    "image-classification": READ_IMAGE
    + """\
scores = session.run(None, {{"image": image}})[0]  # [1, {classes}]
print({names}[scores[0].argmax()])
""",
    "text-classification": """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
tokens = np.array([[12, 7, 345, 2]], dtype=np.int64)  # [batch, time]: word ids from the vocabulary beside the model
lengths = np.array([4], dtype=np.int64)  # [batch]: words in each text, the rest is padding
scores = session.run(None, {{"tokens": tokens, "lengths": lengths}})[0]  # [batch, {classes}]
print({names}[scores[0].argmax()])
""",
    "image-to-image": READ_IMAGE
    + """\
output = session.run(None, {{"image": image}})[0]  # float32 [1, {channels}, {height}, {width}] in 0..1
"""
    + WRITE_IMAGE,
    "unconditional-image-generation": """\
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{folder}/model.onnx")
latent = np.random.default_rng(0).standard_normal((16, {latent}), np.float32)
output = session.run(None, {{"latent": latent}})[0]  # float32 [16, {channels}, {height}, {width}] in 0..1
"""
    + WRITE_IMAGE,
}


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    title: str
    summary: str  # one line
    task: Task  # the hub's name for it; decides how the model is called
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
    image_shape: tuple[int, int, int]  # channels, height, width; zeros for texts
    classes: Sequence[str]  # in the order of the scores; empty where there are none
    files: Mapping[str, str]  # name -> sha256
    limits: Sequence[str]  # a sentence each
    latent: int = 0  # numbers that a generator draws an image from


def model_card(card: Card) -> str:
    """The card as markdown with the hub's front matter; ends with a newline."""
    warning = f"> **{SAMPLE_NOTE}**: the figures show that the pipeline runs, not how good the model is."
    sections = [
        f"---\nlibrary_name: onnx\npipeline_tag: {card.task}\n---",
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
    config = yaml.safe_dump(dict(card.config), sort_keys=False, allow_unicode=True)
    return (
        f"Seed {card.seed}, epochs: {card.epochs}.\n\n"
        f"<details><summary>The resolved configuration</summary>\n\n```yaml\n{config}```\n\n</details>"
    )


def _calling(card: Card) -> str:
    channels, height, width = card.image_shape
    given = {
        "text-classification": '"A text in quotation marks."',
        "unconditional-image-generation": "--count 16 --seed 0",
    }.get(card.task, "input.png")
    code = SNIPPETS[card.task].format(
        folder=card.folder,
        mode="RGB" if channels == 3 else "L",
        channels=channels,
        height=height,
        width=width,
        latent=card.latent,
        classes=len(card.classes),
        names=list(card.classes),
    )
    return (
        f"```sh\npython -m src.predict {card.folder} {given}\n```\n\n"
        f"Or without this repository, with ONNX Runtime alone:\n\n```python\n{code}```"
    )
