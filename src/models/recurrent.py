"""A recurrent network that reads an image row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from src.configuration.schema import Dropout, Layers, PositiveInt
from src.models.layers import run_cells

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class RowReader(nn.Module):
    """Stacked recurrent layers over the rows of an image; a dense layer classifies the output after the last row.

    Maps float [B, *shape], shape (C, H, W), to logits [B, classes]. `cell` is an LSTM (Hochreiter and Schmidhuber,
    1997), a GRU (Cho et al., 2014) or the plain h' = tanh(W x + U h + b). Dropout acts between layers and before the
    dense layer.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        cell: Literal["lstm", "gru", "rnn"] = "lstm",
        hidden: PositiveInt = 128,
        layers: Layers = 2,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        channels, _, width = shape
        between = dropout if layers > 1 else 0.0
        self.cells = CELLS[cell](channels * width, hidden, num_layers=layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)  # [B, H, C * W]
        states = run_cells(self.cells, rows)
        return self.classify(self.dropout(states[:, -1]))
