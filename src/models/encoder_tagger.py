"""Tagging of words with a pretrained encoder of subwords, and a conditional random field over the tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src.configuration.schema import (
    Dropout,
    LayerDecay,
    NonNegativeInt,
    Optimizer,
    Positive,
    PositiveInt,
    Pretrained,
    Probability,
    Schedule,
)
from src.models.tagger import SHAPES, CharacterCNN, Tagging, shapes_of
from src.models.transformer import FineTuned


class EncoderTagger(FineTuned, Tagging):
    """The encoder's state of a word's first subword, the word's characters and shape, a linear layer, a CRF.

    An uncased encoder does not see capitals, which tell most of a name: characters and shapes are read as written.
    `meta["architecture"]` is the encoder's config.json.
    """

    takes = ("tagged_subwords",)

    def __init__(
        self,
        meta: Mapping[str, Any],
        *,
        encoder: Pretrained,
        optimizer: Optimizer,
        schedule: Schedule,
        character_embedding: PositiveInt = 30,
        character_features: PositiveInt = 50,
        hidden: PositiveInt = 256,
        freeze: NonNegativeInt = 0,
        layer_decay: LayerDecay = 1.0,
        head_rate: Positive = 10.0,
        encoder_dropout: Probability = 0.1,
        dropout: Dropout = 0.1,
    ) -> None:
        super().__init__(meta, optimizer=optimizer, schedule=schedule)
        self.begin_from(
            meta,
            meta["pieces"],
            dropout=encoder_dropout,
            freeze=freeze,
            layer_decay=layer_decay,
            head_rate=head_rate,
        )
        self.characters = CharacterCNN(character_embedding, character_features)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(self.encoder.size + character_features + SHAPES, hidden)
        self.score = nn.Linear(hidden, len(meta["tags"]))

    def forward(
        self, pieces: Tensor, piece_lengths: Tensor, firsts: Tensor, characters: Tensor, lengths: Tensor
    ) -> Tensor:
        """Scores [B, T, K].

        pieces int64 [B, P]; piece_lengths int64 [B]; firsts int64 [B, T], the first piece of each word; characters
        int64 [B, T, C]; lengths int64 [B], in words, at least 1.
        """
        states = self.encoder(pieces, piece_lengths)
        states = states.gather(1, firsts[..., None].expand(-1, -1, states.shape[2]))
        shapes = shapes_of(characters, lengths).to(states.dtype)
        x = torch.cat([states, self.characters(characters).to(states.dtype), shapes], dim=-1)
        x = nn.functional.gelu(self.hidden(self.dropout(x)))
        scores: Tensor = self.score(self.dropout(x))
        return scores
