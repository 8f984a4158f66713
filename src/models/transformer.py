"""Text classifiers with an encoder of Hugging Face's transformers, from pretrained weights or from random ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from src.common.errors import Failure
from src.configuration.schema import (
    Dropout,
    LabelSmoothing,
    LayerDecay,
    NonNegativeInt,
    Optimizer,
    Positive,
    Pretrained,
    Probability,
    Schedule,
)
from src.models.base import Model
from src.models.classifier import Classifier
from src.models.layers import is_token


class Encoder(nn.Module):
    """A text encoder: tokens int64 [B, T] and lengths int64 [B] -> states [B, T, size].

    Raises:
        Failure: the data's tokens are not this encoder's.
    """

    def __init__(self, architecture: Mapping[str, Any], vocabulary: int, dropout: float) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        options = {key: value for key, value in architecture.items() if key != "model_type"}
        if "hidden_dropout_prob" in options:  # of BERT and its kin
            options |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = AutoConfig.for_model(architecture["model_type"], **options)
        if vocabulary > config.vocab_size:
            raise Failure(
                f"data.tokenizer: its vocabulary has {vocabulary} pieces, model.encoder knows {config.vocab_size}: "
                "pack the data with this encoder's tokenizer, e.g. data=imdb_subwords"
            )
        self.size: int = config.hidden_size
        self.longest: int | None = getattr(config, "max_position_embeddings", None)
        self.transformer: nn.Module = AutoModel.from_config(config, attn_implementation="sdpa")
        if getattr(self.transformer, "pooler", None) is not None:
            self.transformer.pooler = None  # a head of the pretraining
        self.layers = _layers(self.transformer)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        mask = is_token(tokens, lengths)
        # As the layers take it: the library would make it of a mask of two dimensions after a look at its values, for
        # which the CPU would wait for a GPU.
        attended = mask[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        states: Tensor = self.transformer(input_ids=tokens * mask, attention_mask=attended).last_hidden_state
        return states

    def load(self, folder: Path) -> None:
        """Takes over the pretrained weights in a folder with config.json and model.safetensors.

        Raises:
            Failure: they are of another encoder.
        """
        from transformers import AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # the pretraining's head is not wanted
        logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]):
            loaded = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).state_dict()
        own = self.transformer.state_dict()
        if missing := [key for key, value in own.items() if key not in loaded or loaded[key].shape != value.shape]:
            raise Failure(f"{folder} is of another encoder: it lacks {', '.join(missing[:3])}")
        self.transformer.load_state_dict({key: loaded[key] for key in own})


class FineTuned(Model):
    """Mixin of models over a pretrained `encoder`: its weights, frozen layers and learning rates."""

    library = "transformers"

    def begin_from(
        self,
        meta: Mapping[str, Any],
        vocabulary: int,
        *,
        dropout: float,
        freeze: int,
        layer_decay: float,
        head_rate: float,
    ) -> None:
        """Builds `self.encoder` as `meta["architecture"]`, the encoder's config.json, says.

        Its first `freeze` layers are frozen, of which the embeddings are the first. Factors on learning rates:
        `layer_decay` to the power of a layer's distance from the head, `head_rate` there.

        Raises:
            Failure: the encoder has fewer layers, or the data's tokens are not its own.
        """
        self.architecture = meta["architecture"]
        self.encoder = Encoder(meta["architecture"], vocabulary, dropout)
        self.layer_decay = layer_decay
        self.head_rate = head_rate
        layers = 1 + max(self.encoder.layers.values())
        if freeze > layers:
            raise Failure(
                f"model.freeze: {freeze}, but the encoder has {layers} layers with its embeddings; give fewer"
            )
        for name, parameter in self.encoder.transformer.named_parameters():
            parameter.requires_grad_(self.encoder.layers[name] >= freeze)

    def load_pretrained(self, folder: Path) -> None:
        self.encoder.load(folder)

    def rate_factors(self) -> Mapping[nn.Parameter, float]:
        if self.layer_decay == self.head_rate == 1:
            return {}
        top = 1 + max(self.encoder.layers.values())
        factors = {
            parameter: self.layer_decay ** (top - self.encoder.layers[name])
            for name, parameter in self.encoder.transformer.named_parameters()
        }
        return {parameter: factors.get(parameter, self.head_rate) for parameter in self.parameters()}


class TransformerClassifier(FineTuned, Classifier):
    """Classifies texts: an encoder, the mean of its states or the first one, dropout, a linear layer.

    `meta["architecture"]` is the encoder's config.json.

    Raises:
        Failure: the data's tokens are not this encoder's.
    """

    takes = ("text",)
    varies_in_shape = True

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        encoder: Pretrained,
        optimizer: Optimizer,
        schedule: Schedule,
        pooling: Literal["mean", "first"] = "mean",
        freeze: NonNegativeInt = 0,
        layer_decay: LayerDecay = 1.0,
        head_rate: Positive = 1.0,
        encoder_dropout: Probability = 0.1,
        dropout: Dropout = 0.1,
        label_smoothing: LabelSmoothing = 0.0,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, label_smoothing=label_smoothing)
        self.begin_from(
            meta,
            len(meta["vocabulary"]),
            dropout=encoder_dropout,
            freeze=freeze,
            layer_decay=layer_decay,
            head_rate=head_rate,
        )
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(self.encoder.size, len(meta["classes"]))
        nn.init.normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens int64 [B, T] (anything beyond a length), lengths int64 [B], at least 1 -> logits [B, classes]."""
        states = self.encoder(tokens, lengths)
        if self.pooling == "mean":
            pooled = (states * is_token(tokens, lengths)[..., None]).sum(1) / lengths[:, None].to(states.dtype)
        else:
            pooled = states[:, 0]
        logits: Tensor = self.classify(self.dropout(pooled))
        return logits


def _layers(transformer: nn.Module) -> dict[str, int]:
    """The layer of each parameter: 0 for the embeddings, then as the longest list of equal blocks counts them."""
    lists = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = max(lists, key=lambda name: len(lists[name]))
    layers = {}
    for name, _ in transformer.named_parameters():
        is_block = name.startswith(f"{blocks}.")
        number = int(name.removeprefix(f"{blocks}.").partition(".")[0]) + 1 if is_block else 0
        layers[name] = number if is_block or "embed" in name else len(lists[blocks])
    return layers
