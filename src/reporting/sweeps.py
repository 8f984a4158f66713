"""Plots of a sweep: pure functions from its trials, as `Point`s, to one PNG each.

`label` and `sample` as in `plots`: the text beside the title, and whether the data is a sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.reporting.plots import BLUE, INK, MUTED, ORANGE, RULE, SKY, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABEL = 14  # characters of a value on an axis


@dataclass(frozen=True)
class Point:
    """A finished trial: `state` is complete, pruned or fail; `values`: one for each objective, none after a failure."""

    number: int
    state: str
    values: tuple[float, ...]
    parameters: Mapping[str, Any]


def history(points: Sequence[Point], path: Path, *, objective: str, mode: str, label: str, sample: bool) -> None:
    """Plots each trial's value against its number, and the best so far.

    Raises:
        ValueError: no trial is complete.
    """
    from matplotlib.ticker import MaxNLocator

    complete = [point for point in points if point.state == "complete"]
    if not complete:
        raise ValueError(f"{path}: no trial is complete")
    better = np.maximum if mode == "max" else np.minimum
    reached = better.accumulate([point.values[0] for point in complete])
    pruned = [point for point in points if point.state == "pruned" and point.values]
    failed = [point.number for point in points if point.state == "fail"]
    with picture(path, f"{len(points)} trials, best {reached[-1]:.4g}", 2.9, label=label, sample=sample) as figure:
        axes = figure.subplots()
        axes.step([p.number for p in complete], reached, where="post", color=ORANGE, label="best so far")
        axes.scatter(
            [p.number for p in complete], [p.values[0] for p in complete], s=18, color=BLUE, label="complete", zorder=3
        )
        if pruned:
            # Pruned outliers are clipped to the axis and drawn as arrows.
            low, high = _limits([p.values[0] for p in complete])
            for point in pruned:
                value = min(max(point.values[0], low), high)
                marker = "o" if value == point.values[0] else "v" if value == low else "^"
                axes.scatter([point.number], [value], s=18, color=MUTED, marker=marker, zorder=3)
            axes.scatter([], [], s=18, color=MUTED, label="pruned")
        if failed:
            axes.plot(
                failed, [0.02] * len(failed), "x", color=INK, transform=axes.get_xaxis_transform(), label="failed"
            )
        axes.set(xlabel="trial", ylabel=objective)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, loc="best")


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, extended by its length on either side."""
    span = max(values) - min(values) or abs(values[0]) or 1.0
    return min(values) - span, max(values) + span


def importance(shares: Mapping[str, float], path: Path, *, objective: str, label: str, sample: bool) -> None:
    """Plots the importance of each parameter for being among the best trials; `shares` sum to 1."""
    ordered = sorted(shares.items(), key=lambda item: item[1])
    with picture(path, f"What {objective} depends on", 0.3 * len(ordered) + 0.6, label=label, sample=sample) as figure:
        axes = figure.subplots()
        bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], 0.6, color=BLUE)
        axes.bar_label(bars, [f"{share:.0%}" for _, share in ordered], padding=4, size=8, color=INK)
        axes.margins(x=0.1)
        axes.set(xlabel="share in what sets the best trials apart (PED-ANOVA)", xlim=(0, None))
        axes.grid(axis="y", visible=False)


def parallel(
    points: Sequence[Point],
    path: Path,
    *,
    logarithmic: Sequence[str],
    objective: str,
    mode: str,
    label: str,
    sample: bool,
) -> None:
    """Plots parallel coordinates: a line for each complete trial through its parameters to its value; better is darker.

    The line passes below the axis of a conditional parameter that the trial does not have.

    Raises:
        ValueError: no trial is complete.
    """
    from matplotlib.colors import LinearSegmentedColormap

    complete = [point for point in points if point.state == "complete"]
    if not complete:
        raise ValueError(f"{path}: no trial is complete")
    names = list(dict.fromkeys(name for point in complete for name in point.parameters))
    values = [point.values[0] for point in complete]
    sign = 1 if mode == "max" else -1
    ranks = np.argsort(np.argsort([sign * value for value in values], kind="stable"))
    shades = LinearSegmentedColormap.from_list("rank", [RULE, SKY, BLUE])
    with picture(path, f"{len(complete)} complete trials", 3.4, label=label, sample=sample) as figure:
        axes = figure.subplots()
        columns = [
            *(_heights([p.parameters.get(name) for p in complete], name in logarithmic, axes, x)
              for x, name in enumerate(names)),
            _heights(values, False, axes, len(names)),
        ]  # fmt: skip
        for index in np.argsort(ranks):  # the best on top
            is_best = ranks[index] == len(complete) - 1
            colour = ORANGE if is_best else shades(ranks[index] / max(1, len(complete) - 1))
            heights = [column[index] for column in columns]
            width, zorder = (2.2, 3) if is_best else (1.1, 2)
            axes.plot(range(len(columns)), heights, color=colour, linewidth=width, zorder=zorder)
        short = [name.removeprefix("model.").removeprefix("data.") for name in names]
        axes.set_xticks(range(len(columns)), [*short, objective], rotation=20, ha="right", rotation_mode="anchor")
        axes.set(yticks=[], xlim=(-0.2, len(names) + 0.2), ylim=(-0.2, 1.12))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(axis="y", visible=False)
        for x in range(len(columns)):
            axes.axvline(x, color=MUTED, linewidth=0.6, zorder=1)


def _heights(column: Sequence[Any], logarithmic: bool, axes: Axes, x: int) -> list[float]:
    """Draws the value labels of the axis at `x`; returns the heights in 0..1 of the values, -0.15 for None."""
    numbers = [value for value in column if value is not None]
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    if not is_numeric or not numbers:
        labels = sorted({str(value) for value in column})
        heights = {label: (i / (len(labels) - 1) if len(labels) > 1 else 0.5) for i, label in enumerate(labels)}
        for label, height in heights.items():
            axes.text(x + 0.03, height + 0.02, label[:MAX_LABEL], size=7, color=MUTED)
        return [heights[str(value)] for value in column]
    scale = math.log if logarithmic else float
    low, high = min(numbers), max(numbers)
    for value, height in ((low, 0.0), (high, 1.0)) if high > low else ((low, 0.5),):
        axes.text(x + 0.03, height + 0.02, f"{value:.4g}", size=7, color=MUTED)
    span = scale(high) - scale(low)
    return [-0.15 if v is None else (scale(v) - scale(low)) / span if span else 0.5 for v in column]


def pareto(
    points: Sequence[Point], front: Sequence[int], path: Path, *, objectives: Sequence[str], label: str, sample: bool
) -> None:
    """Plots the complete trials by their first two objectives; `front`: the numbers of those on the Pareto front."""
    complete = [point for point in points if point.state == "complete"]
    best = sorted((p.values[0], p.values[1], p.number) for p in complete if p.number in front)
    with picture(
        path, f"Pareto front, {len(best)} of {len(complete)} trials", 3.2, label=label, sample=sample
    ) as figure:
        axes = figure.subplots()
        axes.scatter([p.values[0] for p in complete], [p.values[1] for p in complete], s=18, color=SKY, label="trial")
        axes.plot([p[0] for p in best], [p[1] for p in best], "o-", color=ORANGE, markersize=5, label="front")
        for first, second, number in best:
            axes.annotate(str(number), (first, second), (4, 4), textcoords="offset points", size=7, color=INK)
        axes.set(xlabel=objectives[0], ylabel=objectives[1])
        axes.legend(fontsize=8)
