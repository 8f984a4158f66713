"""Pictures of a sweep, each a pure function from its trials to one PNG.

A trial is a `Point`; `label` and `sample` are as for all pictures, see `plots`.
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

TEXT = 14  # characters of a value that an axis shows


@dataclass(frozen=True)
class Point:
    """A trial that came to an end: `state` is complete, pruned or fail; a failed one has no values."""

    number: int
    state: str
    values: tuple[float, ...]
    parameters: Mapping[str, Any]


def history(points: Sequence[Point], path: Path, *, objective: str, mode: str, label: str, sample: bool) -> None:
    """Each trial's value against its number, and the best so far. ValueError without a complete trial."""
    from matplotlib.ticker import MaxNLocator

    whole = [point for point in points if point.state == "complete"]
    if not whole:
        raise ValueError(f"{path}: no trial is complete")
    better = np.maximum if mode == "max" else np.minimum
    reached = better.accumulate([point.values[0] for point in whole])
    pruned = [point for point in points if point.state == "pruned" and point.values]
    failed = [point.number for point in points if point.state == "fail"]
    with picture(path, f"{len(points)} trials, best {reached[-1]:.4g}", 2.9, label=label, sample=sample) as figure:
        axes = figure.subplots()
        axes.step([p.number for p in whole], reached, where="post", color=ORANGE, label="best so far")
        axes.scatter(
            [p.number for p in whole], [p.values[0] for p in whole], s=18, color=BLUE, label="complete", zorder=3
        )
        if pruned:
            # One that was ended early for good reason would squeeze all others: it stands at the edge, as an arrow.
            low, high = _window([p.values[0] for p in whole])
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


def _window(values: Sequence[float]) -> tuple[float, float]:
    """The part of an axis that these values need, and as much again on either side."""
    span = max(values) - min(values) or abs(values[0]) or 1.0
    return min(values) - span, max(values) + span


def importance(shares: Mapping[str, float], path: Path, *, objective: str, label: str, sample: bool) -> None:
    """How much each parameter tells the best trials from the rest; `shares` sum to 1."""
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
    """A line for each complete trial through its parameters to its value; the better, the darker.

    A conditional parameter that a trial lacks is passed below the axis. ValueError without a complete trial.
    """
    from matplotlib.colors import LinearSegmentedColormap

    whole = [point for point in points if point.state == "complete"]
    if not whole:
        raise ValueError(f"{path}: no trial is complete")
    names = list(dict.fromkeys(name for point in whole for name in point.parameters))
    values = [point.values[0] for point in whole]
    sign = 1 if mode == "max" else -1
    ranks = np.argsort(np.argsort([sign * value for value in values], kind="stable"))
    shades = LinearSegmentedColormap.from_list("rank", [RULE, SKY, BLUE])
    with picture(path, f"{len(whole)} complete trials", 3.4, label=label, sample=sample) as figure:
        axes = figure.subplots()
        columns = [
            *(_scaled([p.parameters.get(name) for p in whole], name in logarithmic, axes, x)
              for x, name in enumerate(names)),
            _scaled(values, False, axes, len(names)),
        ]  # fmt: skip
        for place in np.argsort(ranks):  # the best on top
            best = ranks[place] == len(whole) - 1
            colour = ORANGE if best else shades(ranks[place] / max(1, len(whole) - 1))
            heights = [column[place] for column in columns]
            axes.plot(range(len(columns)), heights, color=colour, linewidth=2.2 if best else 1.1, zorder=2 + best)
        short = [name.removeprefix("model.").removeprefix("data.") for name in names]
        axes.set_xticks(range(len(columns)), [*short, objective], rotation=20, ha="right", rotation_mode="anchor")
        axes.set(yticks=[], xlim=(-0.2, len(names) + 0.2), ylim=(-0.2, 1.12))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(axis="y", visible=False)
        for x in range(len(columns)):
            axes.axvline(x, color=MUTED, linewidth=0.6, zorder=1)


def _scaled(column: Sequence[Any], logarithmic: bool, axes: Axes, x: int) -> list[float]:
    """The heights in 0..1 of one axis' values, and their labels; what is missing lies below."""
    given = [value for value in column if value is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
    if not numeric or not given:
        kinds = sorted({str(value) for value in column})
        heights = {kind: (i / (len(kinds) - 1) if len(kinds) > 1 else 0.5) for i, kind in enumerate(kinds)}
        for kind, height in heights.items():
            axes.text(x + 0.03, height + 0.02, kind[:TEXT], size=7, color=MUTED)
        return [heights[str(value)] for value in column]
    curve = math.log if logarithmic else float
    low, high = min(given), max(given)
    for value, height in ((low, 0.0), (high, 1.0)) if high > low else ((low, 0.5),):
        axes.text(x + 0.03, height + 0.02, f"{value:.4g}", size=7, color=MUTED)
    span = curve(high) - curve(low)
    return [-0.15 if v is None else (curve(v) - curve(low)) / span if span else 0.5 for v in column]


def pareto(
    points: Sequence[Point], front: Sequence[int], path: Path, *, objectives: Sequence[str], label: str, sample: bool
) -> None:
    """The complete trials by their first two objectives; `front` names those that no other beats in both."""
    whole = [point for point in points if point.state == "complete"]
    best = sorted((p.values[0], p.values[1], p.number) for p in whole if p.number in front)
    with picture(path, f"Pareto front, {len(best)} of {len(whole)} trials", 3.2, label=label, sample=sample) as figure:
        axes = figure.subplots()
        axes.scatter([p.values[0] for p in whole], [p.values[1] for p in whole], s=18, color=SKY, label="trial")
        axes.plot([p[0] for p in best], [p[1] for p in best], "o-", color=ORANGE, markersize=5, label="front")
        for first, second, number in best:
            axes.annotate(str(number), (first, second), (4, 4), textcoords="offset points", size=7, color=INK)
        axes.set(xlabel=objectives[0], ylabel=objectives[1])
        axes.legend(fontsize=8)
