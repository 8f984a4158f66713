"""Tags of words as spans of entities and back: IOB1, IOB2 and IOBES, recognised and checked.

A tag is `O`, or a prefix and the entity's type, as in `B-PER`. IOB1 (CoNLL-2003 as published) begins an entity with
`I-`, and with `B-` only behind another one of the same type; IOB2 begins each with `B-`; IOBES ends those of several
words with `E-` and marks those of one word with `S-` (BILOU writes `L-` and `U-`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["iob1", "iob2", "iobes"]
OUTSIDE = "O"
BILOU = {"L": "E", "U": "S"}  # BILOU's prefixes in IOBES


@dataclass(frozen=True)
class Span:
    """An entity: its first word, the word behind its last one, and its type."""

    start: int
    end: int
    type: str


class TagError(ValueError):
    """A tag that its scheme does not allow; `position` is the word's in its sentence."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


def parts_of(tag: str) -> tuple[str, str]:
    """Prefix and type of a tag, BILOU's as IOBES'; `O` has neither.

    Raises:
        ValueError: it is neither `O` nor PREFIX-TYPE.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, _, entity_type = tag.partition("-")
    prefix = BILOU.get(prefix, prefix)
    if prefix not in ("B", "I", "E", "S") or not entity_type:
        raise ValueError(f"the tag {tag!r} is neither O nor one of B-, I-, E-, S- with a type")
    return prefix, entity_type


def recognise(sentences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme of a file's tags; of IOB1 and IOB2 the one in which more entities begin.

    Raises:
        ValueError: a tag is neither `O` nor PREFIX-TYPE.
    """
    begun = {"B": 0, "I": 0}
    for tags in sentences:
        previous = ""
        for tag in tags:
            prefix, entity_type = parts_of(tag)
            if prefix in ("E", "S"):
                return "iobes"
            if prefix != OUTSIDE and previous != entity_type:
                begun[prefix] += 1
            previous = entity_type
    return "iob1" if begun["I"] > begun["B"] else "iob2"


def spans_of(tags: Sequence[str], scheme: Scheme) -> list[Span]:
    """The entities of a sentence.

    Raises:
        TagError: the sequence is not one of the scheme's.
    """
    spans: list[Span] = []
    start, open_type = 0, ""  # of the entity that the next tag may continue
    for position, tag in enumerate([*tags, OUTSIDE]):
        prefix, entity_type = parts_of(tag)
        goes_on = prefix in ("I", "E") and entity_type == open_type
        before = tags[position - 1] if position else "the beginning of the sentence"
        if open_type and not goes_on:
            if scheme == "iobes":
                raise TagError(position - 1, f"{before} begins or continues an entity that no E-{open_type} ends")
            spans.append(Span(start, position, open_type))
        if prefix in ("I", "E") and not goes_on and (scheme != "iob1" or prefix == "E"):
            raise TagError(position, f"{tag} follows {before}, where {scheme.upper()} has B-{entity_type} first")
        if scheme == "iob1" and prefix == "B" and open_type != entity_type:
            raise TagError(position, f"{tag} follows {before}, where IOB1 has I-{entity_type}")
        if not goes_on:
            start = position
        is_complete = prefix in ("E", "S")
        if is_complete:
            spans.append(Span(start, position + 1, entity_type))
        open_type = "" if is_complete else entity_type
    return spans


def tags_of(spans: Iterable[Span], length: int, scheme: Scheme) -> list[str]:
    """The tags of a sentence of `length` words, in IOB2 or IOBES."""
    tags = [OUTSIDE] * length
    for span in spans:
        prefixes = ["B", *"I" * (span.end - span.start - 1)]
        if scheme == "iobes":
            prefixes[-1] = "S" if len(prefixes) == 1 else "E"
        tags[span.start : span.end] = [f"{prefix}-{span.type}" for prefix in prefixes]
    return tags


def tag_names(types: Iterable[str], scheme: Scheme) -> list[str]:
    """All tags of the scheme for these types, `O` first."""
    return [OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in ("BI" if scheme == "iob2" else "BIES"))]


def is_allowed(before: str | None, tag: str | None, scheme: Scheme) -> bool:
    """Whether a tag may follow another one in IOB2 or IOBES; None: the border of the sentence."""
    (last, last_type), (prefix, entity_type) = parts_of(before or OUTSIDE), parts_of(tag or OUTSIDE)
    continues = prefix in ("I", "E")
    is_open = last in ("B", "I")
    if scheme == "iob2":
        return not continues or (is_open and last_type == entity_type)
    return continues == is_open and (not is_open or last_type == entity_type)


def scheme_of(names: Sequence[str]) -> Scheme:
    """The scheme, IOB2 or IOBES, that `tag_names` gave these names for."""
    return "iobes" if any(name.startswith("E-") for name in names) else "iob2"
