"""What each training step of each experiment launches on a GPU, counted on torch's `meta` device.

Operations that deterministic mode refuses, and graphs of `trainer.compile`, are counted as well. A step of small
kernels is bounded by their number: 5 to 10 us each.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.common.paths import CONF
from src.common.tag_schemes import Span, tag_names
from src.configuration.composing import compose
from src.configuration.declarations import kind_of
from src.data import kinds
from src.data.kinds.tagged import Sentence, arrays_of
from src.training.trainer import adapt
from tests.test_gpu_path import META, MetaDeviceStrategy

EXAMPLES = 12
EPOCHS = 3
TRAINING_BATCH, VALIDATION_BATCH = 4, 8
TOKENS = 5  # of each text
IMAGES = {
    "cifar10": (3, 32, 32),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "facades": (3, 64, 64),
    "horse_or_zebra": (3, 32, 32),
    "horse2zebra": (3, 32, 32),
    "facades_unpaired": (3, 32, 32),
    "bccd": (3, 64, 64),
    "coco": (3, 64, 64),
}
SETS = {"pairs": ("input", "target"), "unpaired": ("a", "b")}
ARCHITECTURES = {
    "TimmClassifier": {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 224, 224]},
    "TransformerClassifier": {
        "model_type": "bert",
        "vocab_size": 3,
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
}
ARCHITECTURES["EncoderTagger"] = ARCHITECTURES["TransformerClassifier"]
# Launches of one training step, all batches of it included: forward, loss, sums, backward, optimizers. Counted on
# 27 November 2026 with torch 2.12, rounded up to the next ten.
LAUNCHES = {
    "bccd_ssd": 910,
    "cifar10_convnet": 160,
    "cifar10_resnet": 370,
    "cifar10_resnet_gpu": 370,
    "conll_lstm": 780,
    "conll_transformer": 1630,
    "coco_ssd": 910,
    "facades_cyclegan": 2110,
    "facades_pix2pix": 700,
    "facades_pix2pix_128": 700,
    "curves_gan": 220,
    "horse2zebra_cyclegan": 2110,
    "horse_or_zebra_timm": 1590,
    "imdb_lstm": 550,
    "imdb_transformer": 1370,
    "mnist_autoencoder": 140,
    "mnist_cnn": 110,
    "mnist_dcgan": 220,
    "mnist_gan": 250,
    "mnist_mlp": 60,
    "mnist_rnn": 2140,
}
# Graphs of each network: for each size of training images, for validation and for its smaller last batch. Pix2pix's
# discriminator has two, one of them with frozen weights.
GRAPHS = {"cifar10_resnet": 4, "mnist_cnn": 3, "mnist_autoencoder": 6, "facades_pix2pix": 5}
# What torch.use_deterministic_algorithms refuses on CUDA, of the operators that networks like ours may call.
REFUSED = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "cumsum",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "max_pool3d_with_indices_backward",
    "nll_loss2d_backward",
    "nll_loss2d_forward",
    "put_",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
}


class Launches(TorchDispatchMode):
    """Counts operations that compute on the device; views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.refused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        on_device = any(isinstance(leaf, Tensor) and leaf.device == META for leaf in tree_leaves(result))
        self.count += on_device and not is_view and not name.startswith("empty")
        if name in REFUSED and any(
            tensor.is_floating_point() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)
        ):
            self.refused.add(name)
        return result


class LaunchesOfSteps(pl.Callback):
    """The launches of each training step."""

    def __init__(self) -> None:
        self.steps: list[Launches] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(Launches())
        self.steps[-1].__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps[-1].__exit__(None, None, None)


def experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def train_on_meta(experiment: str, *overrides: str, **options: Any) -> None:
    """Trains for three epochs on the meta device; `options` are the trainer's."""
    config = compose([f"experiment={experiment}", "trainer=gpu", "output=out", *overrides])
    kind = kind_of({"_target_": config.data.target})
    assert kind is not None
    split: dict[str, Tensor]
    meta: dict[str, Any] = {"kind": kind, "classes": list("0123456789")}
    if kind == "text":
        split = {
            "tokens": torch.zeros(EXAMPLES * TOKENS, dtype=torch.int32),
            "offsets": torch.arange(EXAMPLES + 1) * TOKENS,
            "labels": torch.arange(EXAMPLES) % 2,
        }
        meta |= {"vocabulary": ["<unk>", "<pad>", "word"], "classes": ["a", "b"]}
    elif kind in ("tagged", "tagged_subwords"):
        vocabulary, tags = {"<unk>": 0, "<pad>": 1, "word": 2}, tag_names(["A"], "iobes")
        sentences = [Sentence(["word"] * TOKENS, [Span(1, 3, "A")])] * EXAMPLES
        split = {key: torch.from_numpy(values.copy()) for key, values in arrays_of(sentences, tags, vocabulary).items()}
        meta |= {"vocabulary": list(vocabulary), "tags": tags}
        if kind == "tagged_subwords":
            words = EXAMPLES * TOKENS
            split |= {"pieces": torch.zeros(words, dtype=torch.int32), "piece_offsets": torch.arange(words + 1)}
            meta |= {"pieces": 3, "tokenizer": {"begin": [0], "end": [1], "padding": 2}}
    elif kind == "table":
        split = {"rows": torch.zeros(EXAMPLES, 100)}
        meta |= {"shape": [100]}
    else:
        shape = IMAGES[config.data.name]
        names = SETS.get(kind, ("images",))
        split = {name: torch.zeros(EXAMPLES, *shape, dtype=torch.uint8) for name in names}
        if kind == "boxes":
            split |= {
                "offsets": torch.arange(EXAMPLES + 1),
                "boxes": torch.tensor([[8.0, 8, 40, 40]]).repeat(EXAMPLES, 1),
                "labels": torch.arange(EXAMPLES) % 10,
                "crowd": torch.zeros(EXAMPLES, dtype=torch.uint8),
                "difficult": torch.zeros(EXAMPLES, dtype=torch.uint8),
            }
        if kind == "images":
            split["labels"] = torch.arange(EXAMPLES) % 10
        meta |= {"shape": list(shape), "mean": [0.5] * shape[0], "std": [0.25] * shape[0]}
    if config.pretrained:
        meta |= {"architecture": ARCHITECTURES[config.model.target.rpartition(".")[2]]}
    assert config.data.loader is not None
    loader = config.data.loader.model_copy(update={"batch_size": TRAINING_BATCH, "eval_batch_size": VALIDATION_BATCH})
    make = kinds.load(kind).batches
    train, val = (make(split, meta, loader, train=train, epochs=EPOCHS).to(META) for train in (True, False))
    model = config.model(meta)
    adapt(model, config.trainer)
    vars(model).update(log=lambda *_, **__: None, log_dict=lambda *_, **__: None)  # they read values
    trainer = pl.Trainer(
        strategy=MetaDeviceStrategy(),
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, train, val)


@pytest.mark.parametrize("experiment", experiments())
def test_a_step_launches_no_more_than_it_did_and_nothing_that_deterministic_mode_refuses(experiment: str) -> None:
    launches = LaunchesOfSteps()
    train_on_meta(experiment, callbacks=[launches], limit_val_batches=0)
    assert (
        max(step.count for step in launches.steps[1:]) <= LAUNCHES[experiment]
    )  # the first creates the optimizer's state
    assert set().union(*(step.refused for step in launches.steps)) == set()


@pytest.mark.parametrize("experiment", GRAPHS)
def test_a_compiled_network_has_a_graph_for_each_size(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    train_on_meta(experiment, "trainer.compile=true")
    assert counters["stats"]["unique_graphs"] == GRAPHS[experiment]
    assert not counters["graph_break"]
