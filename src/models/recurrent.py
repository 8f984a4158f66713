"""The recurrent network that reads an image as a text: row after row, keeping in mind what it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from src.configuration.schema import PositiveInt, Probability

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class RowReader(nn.Module):
    """Stacked recurrent layers over the rows of an image; what the last one remembers after the last row is classified.

    Maps float [B, *shape], shape (C, H, W), to logits [B, classes]. `cell` is an LSTM (Hochreiter and Schmidhuber,
    1997), a GRU (Cho et al., 2014) or the plain h' = tanh(W x + U h + b). Dropout stands between layers and before the
    last, dense one.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        cell: Literal["lstm", "gru", "rnn"] = "lstm",
        hidden: PositiveInt = 128,
        layers: PositiveInt = 2,
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__()
        channels, _, width = shape
        between = dropout if layers > 1 else 0.0
        self.cells = CELLS[cell](channels * width, hidden, num_layers=layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)  # [B, H, C * W]
        read, _ = self.cells(rows)
        return self.classify(self.dropout(read[:, -1]))
