"""Tags as spans and back, agreed with seqeval's strict mode; sequences that a scheme does not allow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB1, IOB2, IOBES, Entities

from src.common.tag_schemes import (
    Scheme,
    Span,
    TagError,
    is_allowed,
    recognise,
    scheme_of,
    spans_of,
    tag_names,
    tags_of,
)

THEIRS: dict[Scheme, Any] = {"iob1": IOB1, "iob2": IOB2, "iobes": IOBES}
# The same entities in three schemes: at both borders, side by side, of one type and of two.
SENTENCES: list[dict[Scheme, str]] = [
    {"iob1": "O", "iob2": "O", "iobes": "O"},
    {"iob1": "I-P", "iob2": "B-P", "iobes": "S-P"},
    {"iob1": "I-P I-P I-P", "iob2": "B-P I-P I-P", "iobes": "B-P I-P E-P"},
    {"iob1": "I-P B-P", "iob2": "B-P B-P", "iobes": "S-P S-P"},
    {"iob1": "I-P I-P B-P I-P", "iob2": "B-P I-P B-P I-P", "iobes": "B-P E-P B-P E-P"},
    {"iob1": "I-P I-L I-L O", "iob2": "B-P B-L I-L O", "iobes": "S-P B-L E-L O"},
    {"iob1": "O I-L O I-L", "iob2": "O B-L O B-L", "iobes": "O S-L O S-L"},
]


@pytest.mark.parametrize("scheme", THEIRS)
@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence["iob2"])
def test_entities_are_those_of_seqeval(sentence: dict[Scheme, str], scheme: Scheme) -> None:
    tags = sentence[scheme].split()
    (theirs,) = Entities([tags], THEIRS[scheme]).entities
    assert [(span.start, span.end, span.type) for span in spans_of(tags, scheme)] == [
        (entity.start, entity.end, entity.tag) for entity in theirs
    ]


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence["iob2"])
def test_tags_are_converted_through_spans(sentence: dict[Scheme, str]) -> None:
    spans = spans_of(sentence["iob1"].split(), "iob1")
    schemes: tuple[Scheme, ...] = ("iob2", "iobes")
    for scheme in schemes:
        assert " ".join(tags_of(spans, len(sentence["iob1"].split()), scheme)) == sentence[scheme]


def test_bilou_is_read_as_iobes() -> None:
    tags = ["U-P", "O", "B-L", "I-L", "L-L"]
    assert recognise([tags]) == "iobes"
    assert spans_of(tags, "iobes") == [Span(0, 1, "P"), Span(2, 5, "L")]


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        (["O O", "B-P I-P O"], "iob2"),
        (["O O", "O I-P O"], "iob1"),
        (["I-P B-P B-P"], "iob1"),
        (["B-P I-L", "B-L"], "iob2"),
        (["B-P O", "B-P E-P"], "iobes"),
        (["O"], "iob2"),
    ],
)
def test_a_scheme_is_recognised(sentences: list[str], expected: Scheme) -> None:
    assert recognise(sentence.split() for sentence in sentences) == expected


@pytest.mark.parametrize(
    ("scheme", "tags", "position", "message"),
    [
        ("iob2", "I-P", 0, "I-P follows the beginning of the sentence, where IOB2 has B-P first"),
        ("iob2", "B-P O I-P", 2, "I-P follows O"),
        ("iob2", "B-P I-L", 1, "I-L follows B-P"),
        ("iob1", "O B-P", 1, "B-P follows O, where IOB1 has I-P"),
        ("iob1", "I-L B-P", 1, "B-P follows I-L"),
        ("iobes", "B-P O", 0, "B-P begins or continues an entity that no E-P ends"),
        ("iobes", "O B-P I-P", 2, "I-P begins or continues"),
        ("iobes", "B-P S-P", 0, "B-P begins"),
        ("iobes", "B-P E-L", 0, "B-P begins"),
        ("iobes", "E-P", 0, "E-P follows the beginning"),
        ("iobes", "S-P I-P E-P", 1, "I-P follows S-P"),
    ],
)
def test_an_invalid_sequence_is_refused_with_its_place(scheme: Scheme, tags: str, position: int, message: str) -> None:
    with pytest.raises(TagError, match=message) as error:
        spans_of(tags.split(), scheme)
    assert error.value.position == position


@pytest.mark.parametrize("tag", ["PER", "B-", "X-PER", ""])
def test_what_is_no_tag_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="neither O nor one of"):
        recognise([[tag]])


def test_the_allowed_transitions_are_those_of_valid_sequences() -> None:
    """Of all sequences of four tags those whose transitions are all allowed are those that are read without error."""
    schemes: tuple[Scheme, ...] = ("iob2", "iobes")
    for scheme in schemes:
        names = tag_names(["L", "P"], scheme)
        assert scheme_of(names) == scheme
        for tags in itertools.product(names, repeat=4 if scheme == "iob2" else 3):
            borders = zip((None, *tags), (*tags, None), strict=True)
            is_valid = all(is_allowed(before, tag, scheme) for before, tag in borders)
            try:
                spans_of(tags, scheme)
            except TagError:
                assert not is_valid, tags
            else:
                assert is_valid, tags


def test_seqeval_counts_a_hand_made_case_as_expected() -> None:
    """The case that test_tagging.py counts with this project's own functions."""
    true = [["B-P", "I-P", "O", "B-L"], ["B-L", "B-L", "O"], ["O", "O"]]
    guess = [["B-P", "O", "O", "B-L"], ["B-L", "I-L", "O"], ["B-P", "O"]]
    precision, recall, f1, _ = precision_recall_fscore_support(true, guess, scheme=IOB2, average="micro")
    assert (precision, recall, f1) == pytest.approx((1 / 4, 1 / 4, 1 / 4))
