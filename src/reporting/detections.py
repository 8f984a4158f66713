"""Pictures of detections: boxes drawn on images with Pillow, precision-recall curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from src.reporting import plots
from src.reporting.plots import Title

# Okabe and Ito's palette without black, then darker ones of it.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#F0E442", "#56B4E9", "#E69F00", "#7A3500", "#00395A", "#004F3A")
LIGHT = (COLOURS[4], COLOURS[5], COLOURS[6])  # on which black is read


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str],
    *,
    colour: str | None = None,
) -> np.ndarray:
    """A picture with boxes, a colour for each class, and a caption above each: a new uint8 [H, W, 3].

    image: uint8 [H, W, 3]; boxes: float [N, 4] xyxy, pixels. `colour`: that of all boxes. Captions of empty text are
    left out.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    short = min(picture.size)
    thick = max(1, round(short / 200))
    font = ImageFont.load_default(size=max(10, round(short / 22)))
    for (x1, y1, x2, y2), label, caption in zip(boxes.tolist(), labels, captions, strict=True):
        fill = colour or COLOURS[label % len(COLOURS)]
        # Pillow refuses a box whose corners are in the wrong order, as those of a box below a pixel may be.
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=fill, width=thick)
        if caption:
            left, top, right, bottom = pen.textbbox((x1 + 1, y1), caption, font=font, anchor="lb")
            if top < 0:  # no room above the picture's edge
                left, top, right, bottom = pen.textbbox((x1 + 1, y1), caption, font=font, anchor="lt")
            pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=fill)
            pen.text((left, top), caption, fill="black" if fill in LIGHT else "white", font=font, anchor="lt")
    return np.asarray(picture)


def precision_recall(
    curves: Mapping[str, np.ndarray], recall: np.ndarray, path: Path, headline: str, **title: Unpack[Title]
) -> None:
    """Precision against recall, a curve for each name: float [R] each, NaN where a class has no object."""
    with plots.picture(path, headline, 4.6, **title) as figure:
        axes = figure.subplots()
        for number, (name, precision) in enumerate(curves.items()):
            known = np.isfinite(precision)
            axes.plot(recall[known], precision[known], color=COLOURS[number % len(COLOURS)], label=name)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        if curves:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
