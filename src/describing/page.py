"""A data report as one HTML page that needs nothing beside itself, and as lines for a terminal.

Curves are SVG and pictures are embedded: the page is readable on a phone, has no scripts, and the same report gives the
same bytes. The curves are not matplotlib's, whose import takes longer than the report of a small data set.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.common.files import write_text_atomically
from src.describing import Shown, drift, duplicates
from src.describing.report import Histogram, Report, imbalance
from src.reporting.plots import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RULE, SAMPLE_NOTE
from src.reporting.tables import write_csv, write_metrics

CLASSES = 30  # rows of the table of classes
WORDS = 40
SIDE = 96  # pixels a side of a shown picture, at most
COLUMNS = 100  # of the terminal
CHART = (300, 90)  # units of a histogram
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK)

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.name }}: data report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: {{ ink }}; max-width: 1000px; margin: 1.5rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; max-width: 100% }
th, td { border-bottom: 1px solid {{ rule }}; padding: .2rem .6rem .2rem 0; text-align: right; overflow-wrap: anywhere }
th:first-child, td:first-child { text-align: left } th { color: {{ muted }}; font-weight: 600; overflow-wrap: normal }
.bar { background: {{ blue }}; height: .55rem; display: block; min-width: 1px }
td.bars { width: 35%; min-width: 4rem; padding-right: 0 }
.note, figcaption { color: {{ muted }}; font-size: 13px } .sample { color: {{ orange }} }
.warnings li { margin: .3rem 0 } .warnings b { color: {{ orange }} }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); gap: 1rem }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0 } svg { width: 100%; height: auto; display: block }
figcaption { overflow-wrap: anywhere } img { max-width: 100%; image-rendering: pixelated }
blockquote { margin: .3rem 0; padding-left: .7rem; border-left: 3px solid {{ rule }}; overflow-wrap: anywhere }
.key { display: inline-block; width: .8rem; height: .25rem; vertical-align: middle; margin: 0 .25rem 0 .7rem }
</style></head><body>
<h1>{{ report.name }}</h1>
<p>{{ sizes }}; {{ report.meta.kind }}, profile {{ report.profile }}.
{% if report.is_sample %}<span class="sample">{{ sample_note }}.</span>
{% endif %}
<span class="note">Archive sha256 {{ (report.meta.source.sha256 or "")[:16] }}, data {{ data }}.</span></p>

<h2>Warnings</h2>
{% if report.warnings %}<ol class="warnings">
{% for line in report.warnings %}<li>{% set what, _, remedy = line.partition("; ") -%}
<b>{{ what }}</b>{% if remedy %}; {{ remedy }}{% endif %}</li>
{% endfor %}</ol>{% else %}<p>None.</p>{% endif %}

<h2>Splits and classes</h2>
{% if classes %}
<p class="note">{{ report.description.counted|capitalize }} of each class; the bar is train's.
{{ report.classes|length }} classes, the largest has {{ "%.3g"|format(imbalance) }} times as many as the smallest.
{% if classes|length < report.classes|length %}The {{ classes|length }} largest and smallest are shown.{% endif %}</p>
<table><tr><th>class</th>{% for split in report.splits %}<th>{{ split }}</th>{% endfor %}<th></th></tr>
{% for name, counts in classes %}<tr><td>{{ name }}</td>
{% for split in report.splits %}<td>{{ "{:,}".format(counts[split]) }}</td>{% endfor %}
<td class="bars"><span class="bar" style="width: {{ "%.1f"|format(100 * counts.train / largest) }}%"></span></td></tr>
{% endfor %}</table>
{% else %}<p>{{ sizes }}, without classes.</p>{% endif %}

<h2>Left out</h2>
{% if report.left_out %}<table><tr><th>reason</th><th>files</th></tr>
{% for reason, count in report.left_out.items() %}<tr><td>{{ reason }}</td><td>{{ "{:,}".format(count) }}</td></tr>
{% endfor %}</table>
{% if report.meta.bad %}<table><tr><th>file</th><th>why</th></tr>
{% for name, reason in report.meta.bad[:100] %}<tr><td>{{ name }}</td><td>{{ reason }}</td></tr>
{% endfor %}</table>{% endif %}
{% else %}<p>Nothing: each file of the archive is used.</p>{% endif %}

<h2>Duplicates</h2>
<table><tr><th>splits</th><th>equal</th>{% if has_near %}<th>near-duplicates</th>{% endif %}</tr>
{% for key, count in report.duplicates.equal.items() %}<tr><td>{{ key }}</td><td>{{ "{:,}".format(count) }}</td>
{% if has_near %}<td>{{ "{:,}".format(report.duplicates.near[key]) }}</td>{% endif %}</tr>
{% endfor %}</table>
<p class="note">Within a split those beyond the first of each, between two those of the second.
Groups of equal {{ report.description.noun }} with several answers: {{ report.duplicates.disagreeing }}.
{% if has_near %}Near-duplicates: perceptual hashes (pHash, Zauner 2010) that differ in at most {{ distance }} of 64
bits, and thumbnails that correlate by {{ likeness }} or more. Plain motifs, such as digits, can be that alike by
chance.
{% endif %}</p>
{% if pairs %}<div class="pairs">{% for pair, image in pairs %}<figure><img src="{{ image }}" alt="">
<figcaption>{{ pair.names[0] }}<br>{{ pair.names[1] }}<br>
correlation {{ "%.3f"|format(pair.likeness) }}</figcaption></figure>
{% endfor %}</div>{% endif %}

{% if charts %}<h2>Features</h2>
<p class="note">Share of the {{ report.description.noun }} by value.
{% for split, colour in colours %}<span class="key" style="background: {{ colour }}"></span>{{ split }}{% endfor %}</p>
<div class="grid">{% for histogram, curves in charts %}<figure>
<svg viewBox="0 0 {{ chart[0] }} {{ chart[1] + 14 }}" role="img" aria-label="{{ histogram.title }}">
<line x1="0" x2="{{ chart[0] }}" y1="{{ chart[1] }}" y2="{{ chart[1] }}" stroke="{{ muted }}" stroke-width=".6"/>
{% for colour, points in curves %}<polyline points="{{ points }}" fill="none" stroke="{{ colour }}" stroke-width="1.5"/>
{% endfor %}<text x="0" y="{{ chart[1] + 12 }}" font-size="10" fill="{{ muted }}">
{{ "%.4g"|format(histogram.edges[0]) }}</text>
<text x="{{ chart[0] }}" y="{{ chart[1] + 12 }}" font-size="10" text-anchor="end" fill="{{ muted }}">
{{ "%.4g"|format(histogram.edges[-1]) }}</text></svg>
<figcaption>{{ histogram.title }}</figcaption>
<table><tr><th></th><th>mean</th><th>std</th><th>median</th></tr>
{% for split, values in histogram.statistics.items() %}<tr><td>{{ split }}</td><td>{{ "%.4g"|format(values.mean) }}</td>
<td>{{ "%.4g"|format(values.std) }}</td><td>{{ "%.4g"|format(values.median) }}</td></tr>{% endfor %}</table></figure>
{% endfor %}</div>{% endif %}

{% if figures %}<h2>Figures</h2>
<table><tr><th></th>{% for split in report.splits %}<th>{{ split }}</th>{% endfor %}</tr>
{% for name, values in figures.items() %}<tr><td>{{ name }}</td>
{% for value in values %}<td>{{ "{:,}".format(value) if value is integer else "{:,.4g}".format(value) }}</td>
{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for name, values in categories.items() %}<h2>{{ name|capitalize }}</h2>
<table><tr><th>{{ name }}</th>{% for split in report.splits %}<th>{{ split }}</th>{% endfor %}</tr>
{% for value, counts in values %}<tr><td>{{ value }}</td>
{% for count in counts %}<td>{{ "{:,}".format(count) }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}

<h2>Examples of train</h2>
{% for label, examples in samples.items() %}<h3>{{ label }}</h3>
{% for example in examples %}{% if example.startswith("data:") %}<img src="{{ example }}" alt="{{ label }}">
{% else %}<blockquote>{{ example }}</blockquote>{% endif %}{% endfor %}
{% endfor %}

<p class="note">Sharpness is the standard deviation of the Laplacian (Pech-Pacheco et al., 2000). A split differs from
train in a feature if a test says so ({{ drift.KOLMOGOROV }}, {{ drift.CHI_SQUARED }}; corrected p below
{{ drift.SIGNIFICANCE }}) and at least {{ "%.0f"|format(100 * drift.EFFECT) }} % of its examples would have to
change.</p>
</body></html>
"""


def write(report: Report, folder: Path) -> Path:
    """Writes report.html, metrics.json, classes.csv and features.csv; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(folder / "metrics.json", report.metrics())
    write_csv(folder / "classes.csv", report.counts())
    write_csv(folder / "features.csv", report.features())
    path = folder / "report.html"
    write_text_atomically(path, page(report))
    return path


def page(report: Report) -> str:
    """The page, its pictures inside."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    classes = extremes(report.classes)
    colours = dict(zip(report.splits, COLOURS, strict=False))
    return template.render(
        report=report,
        data=report.metrics()["data"],
        sizes=sizes(report),
        classes=classes,
        largest=max([1, *(counts["train"] for _, counts in classes)]),
        imbalance=imbalance(report.classes),
        has_near=all(examined.hashes is not None for examined in report.splits.values()),
        distance=duplicates.DISTANCE,
        likeness=duplicates.LIKENESS,
        pairs=[(pair, strip(pair.examples)) for pair in report.pairs],
        colours=list(colours.items()),
        charts=[(histogram, list(_curves(histogram, colours))) for histogram in report.histograms],
        chart=CHART,
        figures=_figures(report),
        categories=_categories(report),
        samples={label or "all": _shown(report.samples[label]) for label in _sampled(report, classes)},
        drift=drift,
        sample_note=SAMPLE_NOTE,
        ink=INK,
        muted=MUTED,
        rule=RULE,
        blue=BLUE,
        orange=ORANGE,
    )


def summary(report: Report, most: int = 30) -> Iterator[str]:
    """At most about 40 lines of at most `COLUMNS` characters for a terminal: the warnings first."""
    yield f"{report.name} ({report.profile}): {sizes(report)}"
    for line in report.warnings[: most // 3]:
        yield from _wrapped(f"! {line}")
    if len(report.warnings) > most // 3:
        yield f"! {len(report.warnings) - most // 3} more warnings on the page"
    if report.classes:
        counts = [f"{name} {counts['train']:,}" for name, counts in extremes(report.classes, 10)]
        yield from _wrapped(f"{report.description.counted} of train by class: {', '.join(counts)}", 2)
    equal, near = report.duplicates.equal, report.duplicates.near
    yield f"equal: {', '.join(f'{key} {count:,}' for key, count in equal.items() if count) or 'none'}"[:COLUMNS]
    if all(examined.hashes is not None for examined in report.splits.values()):
        near_counts = ", ".join(f"{key} {count:,}" for key, count in near.items() if count)
        yield f"near-duplicates: {near_counts or 'none'}"[:COLUMNS]
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.left_out.items())
    yield f"left out: {left_out or 'nothing'}"[:COLUMNS]
    shown = report.histograms[:10]
    if shown:
        yield f"{'median':28}" + "".join(f"{split:>12}" for split in report.splits)[: COLUMNS - 28]
    for histogram in shown:
        medians = (histogram.statistics.get(split, {}).get("median") for split in report.splits)
        cells = "".join(f"{'-' if value is None else format(value, '.4g'):>12}" for value in medians)
        yield f"{histogram.name[:28]:28}{cells}"[:COLUMNS]


def _wrapped(line: str, most: int = 3) -> list[str]:
    """A long line as at most `most` lines, the further ones indented."""
    import textwrap

    return textwrap.wrap(line, COLUMNS, subsequent_indent="  ", max_lines=most, placeholder=" …")


def sizes(report: Report) -> str:
    """The number of examples in each split, in words."""
    counts = ", ".join(f"{split} {len(examined):,}" for split, examined in report.splits.items())
    return f"{counts} {report.description.noun}"


def extremes(classes: Mapping[str, Mapping[str, int]], most: int = CLASSES) -> list[tuple[str, Mapping[str, int]]]:
    """Classes in their order; of more than `most` the largest and the smallest of train, by size."""
    if len(classes) <= most:
        return list(classes.items())
    ordered = sorted(classes.items(), key=lambda item: -item[1]["train"])
    return [*ordered[: most - most // 2], *ordered[-(most // 2) :]]


def _sampled(report: Report, classes: Sequence[tuple[str, Any]]) -> list[str]:
    """The classes of which examples are shown."""
    return [label for label, _ in classes if label in report.samples] or list(report.samples)


def _figures(report: Report) -> dict[str, list[float]]:
    names = dict.fromkeys(name for examined in report.splits.values() for name in examined.figures)
    return {name: [examined.figures.get(name, 0) for examined in report.splits.values()] for name in names}


def _categories(report: Report) -> dict[str, list[tuple[str, list[int]]]]:
    """The categorical features but for the class, the most frequent values in train."""
    tables = {}
    for name, train in report.splits["train"].categories.items():
        if name != report.description.label:
            values = sorted(train, key=lambda value: (-train[value], value))[:WORDS]
            counted = [examined.categories.get(name, {}) for examined in report.splits.values()]
            tables[name] = [(value, [counts.get(value, 0) for counts in counted]) for value in values]
    return tables


def _curves(histogram: Histogram, colours: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The colour of each split, and its steps as SVG's points."""
    width, height = CHART
    highest = max(float(shares.max()) for shares in histogram.shares.values()) or 1.0
    step = width / len(histogram.edges[1:])
    for split, shares in histogram.shares.items():
        levels = [height - height * 0.95 * share / highest for share in shares.tolist()]
        points = (f"{x:.1f},{y:.1f}" for i, y in enumerate(levels) for x in (i * step, (i + 1) * step))
        yield colours[split], " ".join(points)


def _shown(examples: Sequence[Shown]) -> list[str]:
    """Texts as they are, pictures as one strip."""
    pictures = [example for example in examples if isinstance(example, np.ndarray)]
    return [strip(pictures)] if pictures else [str(example) for example in examples]


def strip(pictures: Sequence[np.ndarray]) -> str:
    """Pictures uint8 [H, W, 3] side by side as a data address: at most `SIDE` high, small ones enlarged."""
    from PIL import Image

    images = []
    for picture in pictures:
        image = Image.fromarray(np.ascontiguousarray(picture))
        scale = min(1.0, SIDE / image.height)
        images.append(image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale)))))
    factor = max(1, round(64 / max(image.height for image in images)))
    images = [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]
    canvas = Image.new("RGB", (sum(i.width + 4 for i in images) - 4, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + 4
    file = io.BytesIO()
    is_small = factor > 1
    canvas.save(file, "PNG" if is_small else "JPEG", **({} if is_small else {"quality": 85}))
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
