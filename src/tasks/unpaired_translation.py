"""Translation between two domains without pairs: distances of the translations to real images, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from src.common.errors import Failure
from src.common.pictures import beside, spread, to_bytes, to_picture
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation, PositiveInt
from src.data import packed
from src.data.batching import limited
from src.data.kinds.images import WRITE_PICTURE, image_snippet
from src.reporting import plots
from src.tasks import Answer, Evaluated, Request, Task
from src.tasks.translation import METRICS as TRANSLATION
from src.tasks.translation import label_recovery

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.batching import Batch, Batches, BatchSource
    from src.scoring.image_distances import Features

DOMAINS = ("a", "b")
OTHER = {"a": "b", "b": "a"}
SHOWN_IN_TRAINING = 3  # images of each domain
DEFAULT = "B"  # the domain that a caller's image is translated into

ImageNetClass = Annotated[int, Field(ge=0, lt=1000)]


class UnpairedTranslationOptions(Evaluation):
    """What evaluate shows of pictures, and which judges it asks."""

    examples: PositiveInt = Field(default=6, description="images of each domain shown, with translation and way back")
    imagenet: bool = Field(
        default=False, description="also compare features of EfficientNet-Lite0, which the extra `pretrained` installs"
    )
    imagenet_a: list[ImageNetClass] = Field(default=[], description="ImageNet classes that count as domain A")
    imagenet_b: list[ImageNetClass] = Field(default=[], description="ImageNet classes that count as domain B")
    segmenter_epochs: PositiveInt = Field(
        default=12, description="training of the network that recovers labels, where domain B holds label maps"
    )


def _distances(ending: str, title: str) -> dict[str, Metric]:
    """KID and Frechet distance of both directions, and between the untranslated domains."""
    directions = {"to_a": ("min", "B to A"), "to_b": ("min", "A to B"), "domains": (None, "A and B untranslated")}
    return {
        f"{name}{ending}_{key}": Metric(direction, f"{words}, {way}{title}")  # type: ignore[arg-type]
        for name, words in (("kid", "KID"), ("frechet", "Frechet distance"))
        for key, (direction, way) in directions.items()
    }


METRICS: Mapping[str, Metric] = {
    "kid": Metric("min", "KID, mean of both directions", is_validated=True),
    **_distances("", ""),
    **_distances("_imagenet", ", ImageNet features"),
    **{
        f"share_to_{domain}{ending}": Metric(
            direction,  # type: ignore[arg-type]
            f"taken for {domain.upper()}: {title}",
            is_fraction=True,
        )
        for domain in DOMAINS
        for ending, direction, title in (
            ("", "max", "translations"),
            ("_real", None, "real images"),
            ("_untouched", None, "untranslated images"),
        )
    },
    "cycle_l1": Metric("min", "L1 there and back", is_validated=True),
    "identity_l1": Metric("min", "L1 of identity", is_validated=True),
    "l1_to_a": Metric("min", "L1 to the true image, B to A"),
    "l1_to_b": Metric("min", "L1 to the true image, A to B"),
    "l1_untouched": Metric(None, "L1 between A and B untranslated"),
    "mapping_learnt_to_a": Metric("max", "share of the true change, B to A", is_fraction=True),
    "mapping_learnt_to_b": Metric("max", "share of the true change, A to B", is_fraction=True),
    **{name: metric for name, metric in TRANSLATION.items() if name.startswith("labels_")},
    "generator_loss": Metric(None, "loss"),
    "discriminator_loss": Metric(None, "loss"),
    "examples": Metric(None, "examples"),
}


@dataclass(frozen=True)
class BothDomains:
    """The batches of a split with the images of both domains in one: (image uint8 [B, 3, S, S],)."""

    batches: Batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        import torch

        return ((torch.cat(batch),) for batch in self.batches)


class UnpairedTranslation(Task):
    """Translation between the domains A and B. A model answers the image in A and in B, fp32 [B, 3, S, S] in 0..1 each.

    A model's call `model(image, "to_b")` computes one of them.
    """

    takes = ("unpaired",)
    metrics = METRICS
    options = UnpairedTranslationOptions
    outputs = ("to_a", "to_b")

    def evaluate(self, model: Any, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path) -> Evaluated:
        """Draws grid_to_a.png and grid_to_b.png into `folder`; all images are judged as bytes, as a caller has them.

        Where the test images of both domains show the same scenes, translations are compared with the true ones; where
        domain B holds label maps, the labels are read back off the photos that were drawn from them, as `translation`
        does it.
        """
        from src.scoring.image_distances import Extractors

        options = config.evaluation
        assert isinstance(options, UnpairedTranslationOptions)
        real = images_of(test, config.trainer.limit_test_batches)
        drawn = {other: translated(model, real[domain], other, test.size) for domain, other in OTHER.items()}
        back = {domain: translated(model, drawn[other], domain, test.size) for domain, other in OTHER.items()}
        same = {domain: translated(model, real[domain], domain, test.size) for domain in DOMAINS}
        title = plots.Title(label=config.label, sample=config.sample)
        for domain, other in OTHER.items():
            columns = {"input": real[domain], "translation": drawn[other], "way back": back[domain]}
            plots.image_grid(spread(columns, options.examples), folder / f"grid_to_{other}.png", **title)

        extract = Extractors(imagenet=options.imagenet)
        features = {domain: extract(images) for domain, images in real.items()}
        metrics = features["a"].distances(features["b"], "_domains")
        for domain, images in drawn.items():
            judged = extract(images)
            metrics |= judged.distances(features[domain], f"_to_{domain}")
            if extract.judge is not None:
                classes = getattr(options, f"imagenet_{domain}")
                metrics |= shares(domain, classes, judged, features[domain], features[OTHER[domain]])
        metrics["kid"] = (metrics["kid_to_a"] + metrics["kid_to_b"]) / 2
        metrics["cycle_l1"] = (l1(back["a"], real["a"]) + l1(back["b"], real["b"])) / 2
        metrics["identity_l1"] = (l1(same["a"], real["a"]) + l1(same["b"], real["b"])) / 2
        if meta["paired_test"]:
            metrics |= mapping(real, drawn)
        metrics["examples"] = len(real["a"]) + len(real["b"])
        if not meta["palette"]:
            return Evaluated(metrics, options=extract.described)
        recovered = self._labels(config, meta, real, drawn)
        return Evaluated(metrics | recovered.metrics, recovered.pairs, extract.described)

    def _labels(
        self, config: Config, meta: Mapping[str, Any], real: Mapping[str, Tensor], drawn: Mapping[str, Tensor]
    ) -> Evaluated:
        """Labels read back off the photos that were drawn from label maps."""
        import torch

        from src.common.hardware import fast_bf16

        options = config.evaluation
        assert isinstance(options, UnpairedTranslationOptions)
        train = packed.read_split(config.processed, "train")
        side = meta["shape"][-1]
        start = (train["a"].shape[-1] - side) // 2
        middle = slice(start, start + side)
        return label_recovery(
            {"input": train["b"][..., middle, middle], "target": train["a"][..., middle, middle]},
            real["b"],
            drawn["a"],
            real["a"],
            epochs=options.segmenter_epochs,
            seed=config.seed,
            bf16=config.trainer.precision != "32" and fast_bf16(torch.device("cpu")),
        )

    def batches(self, model: Any, batches: Batches) -> BatchSource:
        return BothDomains(batches)

    def showcase(self, model: Any, batch: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """Images of A, then of B: as they are, translated, and back."""
        import torch

        columns: dict[str, list[Tensor]] = {"input": [], "translation": [], "way back": []}
        for images, domain in zip(batch, DOMAINS, strict=True):
            image = images[:SHOWN_IN_TRAINING]
            if len(image):
                there = to_bytes(model(image, f"to_{OTHER[domain]}").float())
                back = to_bytes(model(there, f"to_{domain}").float())
                for column, pictures in zip(columns.values(), (image, there, back), strict=True):
                    column.append(pictures)
        return {name: torch.cat(pictures) for name, pictures in columns.items()}

    def outputs_for(self, request: Request) -> Sequence[str]:
        to = (request.to or DEFAULT).lower()
        if to not in DOMAINS:
            raise Failure(f"--to {request.to}: this model translates between two domains; allowed: A, B")
        return (f"to_{to}",)

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        name = f"{signature['name']}-{(request.to or DEFAULT).lower()}"
        return Answer(picture=to_picture(outputs[0][0]), file=beside(request.source, name))

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return "image-to-image"

    def example_arguments(self, signature: Mapping[str, Any]) -> str:
        return f"{super().example_arguments(signature)} --to {DEFAULT}"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        channels, height, width = signature["shape"]
        return f"""\
{image_snippet(signature)}\
output = session.run(["to_b"], {{"image": image}})[0]  # or "to_a"; float32 [1, {channels}, {height}, {width}] in 0..1
{WRITE_PICTURE}"""


def images_of(test: Batches, limit: int | float | None) -> dict[str, Tensor]:
    """The images of both domains, uint8 [N, 3, S, S] on the CPU, out of the first `limit` batches.

    Raises:
        Failure: there are fewer than two of a domain.
    """
    import torch

    batches = [batch for batch, _ in limited(test, limit)]
    real = {domain: torch.cat([batch[i].cpu() for batch in batches]) for i, domain in enumerate(DOMAINS)}
    for domain, images in real.items():
        if len(images) < 2:
            raise Failure(
                f"{len(images)} test images of domain {domain.upper()} have no distribution to compare with; "
                "take more, with trainer.limit_test_batches or data.loader.eval_batch_size"
            )
    return real


def translated(model: Any, images: Tensor, domain: str, at_once: int) -> Tensor:
    """Images, uint8 [N, 3, S, S], translated into a domain, the same on the CPU."""
    import torch

    with torch.inference_mode():
        pictures = [model(part.to(model.device), f"to_{domain}").float() for part in images.split(at_once)]
        return to_bytes(torch.cat(pictures)).cpu()


def l1(pictures: Tensor, images: Tensor) -> float:
    """The mean absolute difference of bytes, in 0..1."""
    return float((pictures.float() - images.float()).abs().mean()) / 255


def shares(
    domain: str, classes: list[int], translations: Features, real: Features, untouched: Features
) -> dict[str, float]:
    """Which shares an ImageNet classifier takes for the domain: of translations into it, real and untouched images."""
    if not classes:
        return {}
    sets = {"": translations, "_real": real, "_untouched": untouched}
    return {f"share_to_{domain}{ending}": features.share(classes) for ending, features in sets.items()}


def mapping(real: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, float]:
    """How close translations are to the true ones, and to which share they make up for the difference of the domains.

    `mapping_learnt` is 1 for the true images, 0 for the untouched ones, negative for what is further away.
    """
    count = min(len(real["a"]), len(real["b"]))  # fewer of one with trainer.limit_test_batches
    untouched = l1(real["a"][:count], real["b"][:count])
    figures = {f"l1_to_{domain}": l1(drawn[domain][:count], real[domain][:count]) for domain in DOMAINS}
    learnt = {f"mapping_learnt_to_{d}": 1 - figures[f"l1_to_{d}"] / untouched for d in DOMAINS} if untouched else {}
    return figures | {"l1_untouched": untouched} | learnt


TASK = UnpairedTranslation()
