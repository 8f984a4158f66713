"""A comparison as text for a terminal, as rows for a CSV, and as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

from src.reporting.comparison import Group, Variant
from src.reporting.plots import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RULE, SAMPLE_NOTE, SKY, picture
from src.reporting.significance import PairedTest, Summary

SHOWN = 8  # variants whose curves are drawn: more colours are not told apart

CSS = f"""
body {{ font: 14px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ border-bottom: 1px solid {RULE}; padding: .25rem .7rem; text-align: left; vertical-align: top }}
th {{ color: {MUTED}; font-weight: 600 }}
.sample {{ color: {ORANGE}; font-size: 12px }}
.none {{ color: {MUTED} }}
img {{ max-width: 100%; display: block; margin: 1rem 0 }}
summary {{ cursor: pointer; color: {MUTED} }}
"""


def text(group: Group, metrics: Sequence[str]) -> str:
    """A group for the terminal: a line for each variant, then what the tests say."""
    head = ["", "seeds", *metrics, *group.differing]
    rows = [
        [
            f"{variant.number}{'*' if variant.dvc else ''}",
            str(len(variant.runs)),
            *(_said(variant.summary(metric)) for metric in metrics),
            *(_value(variant.settings.get(key, "-")) for key in group.differing),
        ]
        for variant in group.variants
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [_headline(group)]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    for metric in metrics:
        for number, test in group.tests(metric).items():
            lines.append(f"{number} against {group.variants[0].number}, {metric}: {_tested(test)}")
    if any(variant.dvc for variant in group.variants):
        lines.append("* the result that DVC keeps")
    return "\n".join(lines)


def rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """A row for each variant and metric."""
    for group in groups:
        for metric in group.metrics:
            tests = group.tests(metric)
            for variant in group.variants:
                summary = variant.summary(metric)
                if summary is None:
                    continue
                test = tests.get(variant.number)
                yield {
                    "experiment": group.experiment,
                    "profile": group.profile,
                    "variant": variant.number,
                    "metric": metric,
                    "seeds": summary.count,
                    "mean": summary.mean,
                    "std": summary.deviation,
                    "ci_low": summary.low,
                    "ci_high": summary.high,
                    "seeds_in_common": test.seeds if test else None,
                    "difference": test.difference if test else None,
                    "p": test.p if test else None,
                    "verdict": test.verdict if test else None,
                    **{key: _value(variant.settings.get(key, "")) for key in group.differing},
                }


def page(groups: Sequence[Group]) -> str:
    """The page, pictures inside."""
    body = "\n".join(part for group in groups for part in _section(group))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Comparison</title><style>{CSS}</style>\n'
        "<h1>Comparison</h1>\n<p>Mean over seeds ± standard deviation, with the 95 % confidence interval of the mean "
        "(Student's t). Tests are paired over the seeds in common, two-sided, with Holm's correction.</p>\n"
        f"{body}\n</html>\n"
    )


def _section(group: Group) -> Iterator[str]:
    sample = group.profile == "sample"
    note = f' <span class="sample">{SAMPLE_NOTE}</span>' if sample else ""
    yield f"<h2>{html.escape(group.experiment)} · {html.escape(group.profile)}{note}</h2>"
    headline = [metric for metric in group.headline if metric in group.metrics]
    yield _html_table(
        ["variant", "seeds", *headline, *group.differing],
        [
            [
                f"{variant.number}{' (DVC)' if variant.dvc else ''}",
                ", ".join(str(run.seed) for run in variant.runs),
                *(_said(variant.summary(metric)) for metric in headline),
                *(_value(variant.settings.get(key, "-")) for key in group.differing),
            ]
            for variant in group.variants
        ],
    )
    if len(group.variants) > 1:
        differences = [
            [f"{number} against {group.variants[0].number}", metric, _tested(test)]
            for metric in headline
            for number, test in group.tests(metric).items()
        ]
        yield _html_table(["variants", "metric", "difference"], differences)
    label = f"{group.experiment} · {group.profile}"
    yield _image(lambda file: curves(group, file, label=label, sample=sample))
    for metric in headline:
        if any((s := variant.summary(metric)) and s.count > 1 for variant in group.variants):
            yield _image(lambda file, metric=metric: intervals(group, metric, file, label=label, sample=sample))
    others = [metric for metric in group.metrics if metric not in headline]
    table = _html_table(
        ["metric", *(f"variant {variant.number}" for variant in group.variants)],
        [[metric, *(_said(variant.summary(metric)) for variant in group.variants)] for metric in others],
    )
    yield f"<details><summary>all other metrics</summary>{table}</details>"


def curves(group: Group, file: io.BytesIO, *, label: str, sample: bool) -> None:
    """What training looked at, epoch by epoch: each variant's mean over seeds, and the range of its runs."""
    from matplotlib.ticker import MaxNLocator

    monitor = group.monitor
    with picture(file, f"{monitor} by epoch", 3.2, label=label, sample=sample) as figure:
        axes = figure.subplots()
        for variant, colour in zip(group.variants[:SHOWN], _colours(), strict=False):
            by_epoch: dict[float, list[float]] = {}
            for run in variant.runs:
                for row in run.history:
                    if math.isfinite(value := row.get(monitor, math.nan)):
                        by_epoch.setdefault(row["epoch"], []).append(value)
            epochs, values = list(by_epoch), list(by_epoch.values())
            means = [sum(some) / len(some) for some in values]
            axes.plot(
                epochs, means, color=colour, label=_name(group, variant), marker="o" if len(epochs) < 20 else None
            )
            if len(variant.runs) > 1:
                axes.fill_between(
                    epochs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0
                )
        axes.set(xlabel="epoch", ylabel=monitor)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)


def intervals(group: Group, metric: str, file: io.BytesIO, *, label: str, sample: bool) -> None:
    """Each variant's runs as dots, its mean and the mean's confidence interval."""
    shown = [variant for variant in group.variants if variant.summary(metric)]
    with picture(file, f"{metric}, 95 % intervals", 0.34 * len(shown) + 0.7, label=label, sample=sample) as figure:
        axes = figure.subplots()
        for place, variant in enumerate(shown):
            summary = variant.summary(metric)
            assert summary is not None
            values = [run.metrics[metric] for run in variant.runs if metric in run.metrics]
            axes.plot(values, [place] * len(values), "o", color=SKY, markersize=4)
            if summary.low is not None and summary.high is not None:
                axes.plot([summary.low, summary.high], [place, place], color=BLUE)
            axes.plot([summary.mean], [place], "|", color=BLUE, markersize=12, markeredgewidth=2)
        axes.set_yticks(range(len(shown)), [_name(group, variant) for variant in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(metric)


def _colours() -> Iterator[str]:
    return cycle([BLUE, ORANGE, GREEN, PURPLE, SKY, INK, MUTED])


def _name(group: Group, variant: Variant) -> str:
    """A variant's number and what it is, as far as a legend has room."""
    parts = [f"{key.rpartition('.')[2]}={_value(variant.settings.get(key, '-'))}" for key in group.differing]
    return f"{variant.number}: {' '.join(parts)}"[:60] if parts else str(variant.number)


def _headline(group: Group) -> str:
    note = f" ({SAMPLE_NOTE})" if group.profile == "sample" else ""
    return f"{group.experiment} · {group.profile}{note}"


def _said(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    if summary.deviation is None:
        return f"{summary.mean:.4g}"
    return f"{summary.mean:.4g} ± {summary.deviation:.2g} [{summary.low:.4g}, {summary.high:.4g}]"


def _tested(test: PairedTest) -> str:
    if not test.seeds:
        return test.verdict
    if test.p is None:
        return f"{test.difference:+.4g}; {test.verdict}"
    return (
        f"{test.difference:+.4g} [{test.low:+.4g}, {test.high:+.4g}], p {test.p:.2g} over {test.seeds} seeds: "
        f"{test.verdict}"
    )


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _image(draw: Any) -> str:
    file = io.BytesIO()
    draw(file)
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="">'
