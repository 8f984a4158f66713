"""Texts with their entities marked: in colours on a terminal or on a page, in brackets elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from src.common.files import write_text_atomically
from src.common.tag_schemes import Span
from src.reporting.plots import BLUE, GREEN, ORANGE, PURPLE, SAMPLE_NOTE, SKY, Title

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)  # of the types, in their order
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #1f2933 }}
mark {{ color: inherit; border-radius: .3em; padding: .1em .3em }}
mark small {{ font-weight: bold; margin-left: .4em }}
p {{ margin: .2em 0 }} h2 {{ font-size: 1em; margin-top: 1.6em }} b {{ display: inline-block; width: 6em }}
</style></head><body>
{body}
</body></html>
"""


def marked(text: str, spans: Sequence[Span], types: Sequence[str], *, in_colour: bool) -> str:
    """A text with its entities marked; `spans` count characters and do not overlap.

    In colour each is followed by its type, in a terminal's escape codes; else it stands as `[Berlin](LOC)`.
    """
    parts, last = [], 0
    for span in spans:
        entity = text[span.start : span.end]
        if in_colour:
            red, green, blue = (int(_colour(span.type, types)[i : i + 2], 16) for i in (1, 3, 5))
            shown = f"\x1b[1;97;48;2;{red};{green};{blue}m {entity} \x1b[2m{span.type} \x1b[0m"
        else:
            shown = f"[{entity}]({span.type})"
        parts += [text[last : span.start], shown]
        last = span.end
    return "".join([*parts, text[last:]])


def marked_words(words: Sequence[str], spans: Sequence[Span], types: Sequence[str]) -> str:
    """A sentence with its entities marked, as HTML; `spans` count words."""
    escaped = [html.escape(word) for word in words]
    for span in spans:
        colour, name = _colour(span.type, types), html.escape(span.type)
        escaped[span.start] = f'<mark style="background: {colour}40">' + escaped[span.start]
        escaped[span.end - 1] += f'<small style="color: {colour}">{name}</small></mark>'
    return " ".join(escaped)


def mistakes_page(rows: Sequence[Mapping[str, Any]], types: Sequence[str], path: Path, **title: Unpack[Title]) -> None:
    """Writes sentences with mistakes as a page, in their order.

    rows: `words`, the spans `true` and `predicted`, and `mistake`, a line.
    """
    blocks = ["<h1>The most confident mistakes</h1>", f"<p>{html.escape(title['label'])}</p>"]
    if title["sample"]:
        blocks.append(f"<p><strong>{SAMPLE_NOTE}</strong></p>")
    for number, row in enumerate(rows, 1):
        blocks.append(f"<h2>{number}. {html.escape(row['mistake'])}</h2>")
        for name in ("true", "predicted"):
            blocks.append(f"<p><b>{name}</b>{marked_words(row['words'], row[name], types)}</p>")
    if not rows:
        blocks.append("<p>None.</p>")
    write_text_atomically(path, PAGE.format(title=html.escape(title["label"]), body="\n".join(blocks)))


def _colour(entity_type: str, types: Sequence[str]) -> str:
    return COLOURS[types.index(entity_type) % len(COLOURS)]
