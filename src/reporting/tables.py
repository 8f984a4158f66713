"""Numbers and texts of a run as files: CSV, JSON and markdown whose bytes depend on their content alone.

Floats keep 6 significant digits: enough to compare runs, too few for the last bits of a sum to show up in a diff.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from src.common.files import write_text_atomically
from src.reporting.plots import SAMPLE_NOTE, Title

EXCERPT = 600  # characters of a text that a reader still reads


def _plain(value: Any) -> Any:
    """The value as Python's own, floats rounded; NaN and the infinities, which JSON cannot write, as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Writes numbers, possibly nested, as JSON with sorted keys; a number that is not finite becomes null."""
    text = json.dumps(_plain(metrics), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV with LF endings, columns in order of first appearance.

    A cell is empty where the row lacks the column, or where the number is not finite.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    if columns:
        writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    write_text_atomically(path, file.getvalue())


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of numbers that `write_csv` wrote; empty cells are left out.

    Raises:
        OSError: it can't be read.
        ValueError: a cell holds no number.
    """
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def confusion_pairs(actual: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> list[dict[str, str]]:
    """A row `actual`, `predicted` per example, by class name, for DVC's confusion template; int [N] indices each."""
    pairs = zip(actual.tolist(), predicted.tolist(), strict=True)
    return [{"actual": classes[true], "predicted": classes[guess]} for true, guess in pairs]


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A GitHub table of the named columns, numbers to the right; ends with a newline."""
    cells = [[_plain(row.get(name)) for name in columns] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in cells) for i in range(len(columns))
    ]
    lines = [list(columns), ["---:" if right else "---" for right in numeric]]
    lines += [["" if cell is None else _cell(str(cell)) for cell in row] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def text_mistakes(texts: Sequence[str], rows: Sequence[Mapping[str, Any]], path: Path, **title: Unpack[Title]) -> None:
    """Writes the most confident mistakes on texts as markdown, in their order.

    rows, one per text: true and predicted (class names) and confidence (0..1). Texts are cut at a word, and escaped: a
    review's own tags and asterisks are shown, not rendered.
    """
    blocks = ["# The most confident mistakes", title["label"]]
    if title["sample"]:
        blocks.append(f"**{SAMPLE_NOTE}**")
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
        true, predicted = _escaped(str(row["true"])), _escaped(str(row["predicted"]))
        blocks.append(f"## {number}. {predicted} {row['confidence']:.1%}, is {true}")
        # The quotation mark is not decoration: a text that starts with "1." or "-" stays a text.
        blocks.append(f"> “{_escaped(_excerpt(text))}”")
    if not rows:
        blocks.append("None.")
    write_text_atomically(path, "\n\n".join(blocks) + "\n")


def _excerpt(text: str) -> str:
    """The text on one line, cut at a word if it is longer than `EXCERPT` characters."""
    text = " ".join(text.split())
    if len(text) <= EXCERPT:
        return text
    head, _, _ = text[:EXCERPT].rpartition(" ")
    return (head or text[:EXCERPT]) + " …"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", html.escape(text, quote=False))
