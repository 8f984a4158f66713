"""Pictures of a run, each a pure function from arrays or rows to one PNG.

The same input gives the same bytes: no dates, no matplotlibrc, no window system. Every function takes the keywords of
`Title` besides its own arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, Unpack

import numpy as np

from src.common.files import replacing
from src.common.pictures import mosaic
from src.configuration.metrics import SPLITS, Metric, metric_logged_as

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLE_NOTE = "sample data - not a benchmark"


class Title(TypedDict):
    """What stands above every picture."""

    label: str  # the line under the headline: experiment, profile, seed
    sample: bool  # adds a visible note, so that no picture of sample data passes for a benchmark


# Okabe and Ito's palette: told apart with every kind of colour blindness.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
INK, MUTED, RULE = "#1f2933", "#6b7785", "#dfe3e8"

WIDTH, DPI = 8.0, 120  # 960 pixels: the width of a README
MARGIN, HEADER = 0.15, 0.62  # inches

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "text.color": INK,
    "text.parse_math": False,  # a class may be named "$"
}


@contextmanager
def picture(path: Path | BinaryIO, headline: str, height: float, **title: Unpack[Title]) -> Iterator[Figure]:
    """A figure of `WIDTH` x `height` inches below a header; a PNG at `path` unless the block raises."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = height + HEADER
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, total), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained", rect=(0, 0, 1, height / total), w_pad=0.1, h_pad=0.08)
        left, right = MARGIN / WIDTH, 1 - MARGIN / WIDTH
        figure.text(left, 1 - 0.14 / total, headline, size=12, weight="bold", va="top")
        figure.text(left, 1 - 0.39 / total, title["label"], color=MUTED, va="top")
        if title["sample"]:
            badge = {"boxstyle": "round,pad=0.35", "facecolor": "#fdf1e7", "edgecolor": ORANGE, "linewidth": 0.6}
            figure.text(right, 1 - 0.2 / total, SAMPLE_NOTE, size=8, color=ORANGE, ha="right", va="top", bbox=badge)
        yield figure
        # Without the Software field the bytes do not change with matplotlib's version number.
        with replacing(path) if isinstance(path, Path) else nullcontext(path) as file:
            figure.savefig(file, format="png", metadata={"Software": None})


def curves(
    history: Sequence[Mapping[str, float]], metrics: Mapping[str, Metric], path: Path, **title: Unpack[Title]
) -> None:
    """A training's metrics against the epoch: the loss first, the learning rate last, all fractions in one panel.

    history: a row per epoch with `epoch` and any metrics, e.g. train_loss, val_loss, val_accuracy (0..1), lr.
    `metrics`: those of the task, whose titles name the panels; one that it does not have gets a panel of its own name.
    Missing, null, NaN and infinite values are left out. ValueError if there are none.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panels = _panels(
        list(dict.fromkeys(key for row in history for key in row if key not in ("epoch", "step"))), metrics
    )
    if not panels:
        raise ValueError(f"{path}: the history has no metrics to draw; train for at least one epoch")
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    epochs = f"{len(history)} epochs" if len(history) > 1 else "1 epoch"
    with picture(path, f"Training curves, {epochs}", 2.7 * down, **title) as figure:
        grid = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            _draw_curves(axes, panel, history)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_formatter(FuncFormatter(_tick))
            axes.set_xlabel("epoch")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()


def _tick(value: float, _: int) -> str:
    """A short decimal; rates below a thousandth as 2e-4."""
    if 0 < abs(value) < 1e-3:
        return np.format_float_scientific(value, precision=3, trim="-", exp_digits=1)
    return f"{value:g}"


@dataclass
class Panel:
    """Curves that share axes."""

    is_fraction: bool
    titles: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # logged name -> the metric's own, without the split

    def series(self, key: str) -> str:
        """What tells a curve from the others of the panel: "val", not "val loss", where all are losses."""
        if len(set(self.names.values())) == 1:
            key = key.removesuffix(self.names[key])
        elif len(self.titles) == 1:
            key = key.removesuffix(self.titles[0])
        return key.strip("_").replace("_", " ")


def _panels(keys: Sequence[str], metrics: Mapping[str, Metric]) -> list[Panel]:
    """The panels of these logged names, the loss first and the learning rate last."""
    panels: dict[str, Panel] = {}
    for key in keys:
        metric = metric_logged_as(key, metrics) or Metric(None, key)
        panel = panels.setdefault("fractions" if metric.is_fraction else metric.title, Panel(metric.is_fraction))
        if metric.title not in panel.titles:
            panel.titles.append(metric.title)
        split, _, name = key.partition("_")
        panel.names[key] = name if split in SPLITS else key
    return sorted(panels.values(), key=lambda panel: ("lr" in panel.names, panel.titles != ["loss"]))


def _draw_curves(axes: Axes, panel: Panel, history: Sequence[Mapping[str, float]]) -> None:
    axes.set_title(" and ".join(panel.titles) + (", %" if panel.is_fraction else ""))
    colours = cycle([GREEN, PURPLE, SKY, INK])
    for key in panel.names:
        series = panel.series(key)
        points = [(row.get("epoch", index), row.get(key)) for index, row in enumerate(history)]
        x, y = np.array([p for p in points if p[1] is not None and math.isfinite(p[1])], float).reshape(-1, 2).T
        colour = {"": BLUE, "train": BLUE, "val": ORANGE}.get(series) or next(colours)
        scaled = 100 * y if panel.is_fraction else y
        axes.plot(x, scaled, color=colour, label=series, marker="o" if len(history) <= 20 else None)
    if any(not text.startswith("_") for text in axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=8)
    if "lr" in panel.names:
        axes.set_ylim(bottom=0)


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str], path: Path, **title: Unpack[Title]) -> None:
    """Counts by true class (rows) and predicted class (columns); colours are fractions of the row.

    matrix: int [C, C]. The counts are written up to 20 classes; the bars at the side are each class's recall.
    ValueError if the matrix and the classes do not fit.
    """
    size = len(classes)
    if matrix.shape != (size, size):
        raise ValueError(f"{path}: a confusion matrix of shape {matrix.shape} for {size} classes; pass [C, C]")
    from matplotlib.colors import LinearSegmentedColormap

    totals = matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(totals, 1)
    right, total = int(np.trace(matrix)), int(matrix.sum())
    headline = f"Confusion matrix, {right:,} of {total:,} right ({right / max(total, 1):.1%})"
    height = float(np.clip(0.46 * size + 1.2, 2.6, 7.2))
    with picture(path, headline, height, **title) as figure:
        cells, side = figure.subplots(1, 2, sharey=True, width_ratios=[6, 1])
        blues = LinearSegmentedColormap.from_list("share", ["#ffffff", "#9ecae9", BLUE, "#053a5f"])
        cells.imshow(share, cmap=blues, vmin=0, vmax=1, aspect="auto")
        step = math.ceil(size / 25)  # more names than this would overlap
        slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if size > 5 else {}
        cells.set_xticks(range(0, size, step), classes[::step], **slant)
        cells.set_yticks(range(0, size, step), classes[::step])
        cells.set(xlabel="predicted", ylabel="true")
        cells.grid(False)
        if size <= 20:
            for (row, column), count in np.ndenumerate(matrix):
                colour = "white" if share[row, column] > 0.45 else INK if count else "#b8c0c9"
                cells.text(column, row, f"{count:,}", ha="center", va="center", color=colour, size=8)
        recall = share.diagonal()
        side.barh(range(size), recall, height=0.62, color=BLUE)
        side.tick_params(left=False, labelleft=False)
        side.set(title="recall", xlim=(0, 1), xticks=[])
        side.spines[["bottom", "left"]].set_visible(False)
        side.grid(False)
        if size <= 25:
            for row, value in enumerate(recall):
                text = f"{value:.1%}" if totals[row] else "no example"
                side.text(1.04, row, text, va="center", size=8, color=INK if totals[row] else MUTED)


def reliability_diagram(bins: Sequence[Mapping[str, float]], error: float, path: Path, **title: Unpack[Title]) -> None:
    """Accuracy against confidence with the gap between them shaded, above a histogram of the confidences.

    bins: rows with low, high, count, confidence and accuracy (means), as `scoring.calibration` makes them; error: the
    expected calibration error, 0..1.
    """
    rows = [row for row in bins if row["count"]]
    total = sum(row["count"] for row in rows)
    headline = f"Reliability, expected calibration error {error:.1%}"
    middle = [(row["low"] + row["high"]) / 2 for row in rows]
    mean, accuracy = ([row[name] for row in rows] for name in ("confidence", "accuracy"))
    with picture(path, headline, 5.2, **title) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        width = 0.92 / len(bins)
        top.bar(middle, accuracy, width, color=BLUE, label="accuracy")
        for name, sign, colour, tint, hatch in (
            ("gap: confidence too high", 1, ORANGE, "#f9ddcc", "////"),
            ("gap: confidence too low", -1, GREEN, "#cceee4", "\\\\\\\\"),
        ):
            gap = [c - a if sign * (c - a) > 0 else np.nan for c, a in zip(mean, accuracy, strict=True)]
            if not np.all(np.isnan(gap)):
                look = {"facecolor": tint, "edgecolor": colour, "linewidth": 0.8, "hatch": hatch}
                top.bar(middle, gap, width, bottom=accuracy, label=name, **look)
        top.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1, label="perfect calibration")
        top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
        top.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
        bottom.bar(middle, [row["count"] / total for row in rows], width, color=MUTED)
        bottom.set(xlabel="confidence", ylabel="share of examples")
        for axis in (top.xaxis, top.yaxis, bottom.yaxis):
            axis.set_major_formatter("{x:.0%}")


def mistakes(images: np.ndarray, rows: Sequence[Mapping[str, Any]], path: Path, **title: Unpack[Title]) -> None:
    """The most confident mistakes: images, upscaled pixel by pixel, under captions of two lines.

    images: uint8 [K, H, W, C], C of 1 or 3; rows: true and predicted (class names) and confidence (0..1). K may be 0.
    """
    captions = [f"{row['predicted']} {row['confidence']:.0%}\nis {row['true']}" for row in rows]
    if len(images) == 0:
        with picture(path, "No mistakes", 0.1, **title):
            return
    headline = f"The {len(images)} most confident mistakes" if len(images) > 1 else "The most confident mistake"
    _draw_grid(images, captions, path, headline, across=6, gaps=(), **title)


def image_grid(columns: Mapping[str, np.ndarray], path: Path, **title: Unpack[Title]) -> None:
    """Examples side by side: a column for each key, e.g. input, output, target; uint8 [K, H, W, C] each.

    A row is one example; from five examples on, a row holds two. ValueError if the columns differ in shape.
    """
    shapes = {name: images.shape for name, images in columns.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"{path}: the columns of an image grid must share one shape, not {shapes}")
    count = len(next(iter(columns.values())))
    blocks = 2 if count > 4 else 1
    # [K, columns, H, W, 3] -> one row after the other, as they are read.
    images = np.stack(list(columns.values()), axis=1).reshape(-1, *next(iter(columns.values())).shape[1:])
    captions = [*columns] * blocks + [""] * (len(images) - len(columns) * blocks)
    gaps = (len(columns),) if blocks == 2 else ()
    headline = f"{count} examples: {', '.join(columns)}" if count > 1 else f"An example: {', '.join(columns)}"
    _draw_grid(images, captions, path, headline, len(columns) * blocks, gaps, **title)


def samples(images: np.ndarray, path: Path, **title: Unpack[Title]) -> None:
    """Drawn images close together in a square: uint8 [K, H, W, C], C of 1 or 3."""
    _draw_grid(mosaic(images)[None], [""], path, f"{len(images)} drawn images", 1, (), largest=WIDTH, **title)


def latent_plane(
    points: np.ndarray, labels: np.ndarray, classes: Sequence[str], path: Path, **title: Unpack[Title]
) -> None:
    """Where images lie in a plane of the latent space: float [N, 2], int [N] classes, a colour for each."""
    from matplotlib import colormaps

    headline = f"{len(points):,} images in the latent space's plane of most variance"
    with picture(path, headline, 5.6, **title) as figure:
        axes = figure.subplots()
        colours = colormaps["tab10" if len(classes) <= 10 else "tab20"]
        for number, name in enumerate(classes):
            x, y = points[labels == number].T
            axes.scatter(x, y, s=9, alpha=0.7, linewidths=0, color=colours(number % colours.N), label=name)
        axes.set(xlabel="first principal component", ylabel="second")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)


def _draw_grid(
    images: np.ndarray,
    captions: Sequence[str],
    path: Path,
    headline: str,
    across: int,
    gaps: Sequence[int],
    largest: float = 2.6,
    **title: Unpack[Title],
) -> None:
    """Tiles, each at most `largest` inches wide, `across` in a row, a caption above each.

    `gaps` are the columns with more room to their left.
    """
    down = math.ceil(len(images) / across)
    space, wide, line = 0.07, 0.2, 0.15  # inches: between tiles, at a gap, for a line of a caption
    tile = min((WIDTH - 2 * MARGIN - (across - 1) * space - len(gaps) * wide) / across, largest)
    tall = tile * images.shape[1] / images.shape[2]
    rows = [captions[start : start + across] for start in range(0, len(images), across)]
    room = [space + line * max((text.count("\n") + 1 if text else 0) for text in row) for row in rows]
    height = sum(room) + down * tall + MARGIN
    with picture(path, headline, height, **title) as figure:
        figure.set_layout_engine("none")  # every tile has its place, in inches from the top left
        total = height + HEADER
        for index, image in enumerate(images):
            row, column = divmod(index, across)
            left = MARGIN + column * (tile + space) + wide * sum(column >= gap for gap in gaps)
            bottom = height - sum(room[: row + 1]) - (row + 1) * tall
            axes = figure.add_axes((left / WIDTH, bottom / total, tile / WIDTH, tall / total))
            # "auto" is nearest neighbour for enlarging threefold or more, and smooth for photos about to shrink.
            shown = image.squeeze(-1) if image.shape[-1] == 1 else image
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="auto", aspect="auto")
            axes.set_axis_off()
            # Line by line: within one text, the spacing depends on which letters have descenders.
            for number, text in enumerate(reversed(captions[index].split("\n"))):
                above = bottom + tall + 0.04 + number * line
                figure.text(left / WIDTH, above / total, text, size=8)


def latency(rows: Sequence[Mapping[str, float]], path: Path, **title: Unpack[Title]) -> None:
    """Milliseconds per example, PyTorch beside ONNX Runtime, for each batch size.

    rows: batch (examples), pytorch_ms, onnxruntime_ms and perhaps int8_ms (milliseconds for the whole batch, e.g.
    medians).
    """
    engines = {"pytorch_ms": ("PyTorch", SKY), "onnxruntime_ms": ("ONNX Runtime", BLUE), "int8_ms": ("int8", GREEN)}
    engines = {key: how for key, how in engines.items() if key in rows[0]}
    thick = 0.76 / len(engines)
    with picture(path, "Inference latency", 0.31 * len(engines) * len(rows) + 0.7, **title) as figure:
        axes = figure.subplots()
        for place, (key, (name, colour)) in enumerate(engines.items()):
            per_example = [row[key] / row["batch"] for row in rows]
            heights = [index + thick * (place - (len(engines) - 1) / 2) for index in range(len(rows))]
            bars = axes.barh(heights, per_example, 0.9 * thick, color=colour, label=name)
            texts = [f"{value:.3g} ms" for value in per_example]
            axes.bar_label(bars, texts, padding=4, size=8, color=INK)
        axes.set_yticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds per example (shorter is better)")
        axes.legend(loc="lower right")
