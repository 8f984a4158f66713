"""Words, their subwords and their tags: in step at every border, in training as for a caller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.common.errors import Failure
from src.common.tag_schemes import Span
from src.data import subwords
from src.data.kinds.tagged import Sentence, arrays_of
from src.data.kinds.tagged_subwords import KIND, SubwordBatches, SubwordLoader, with_pieces
from tests.test_pretrained import tiny_bert  # noqa: F401  (a fixture)

TAGS = ["O", "B-PER", "I-PER", "E-PER", "S-PER"]
SENTENCES = [
    Sentence(["A", "Good", "unbelievable", "Film", "."], [Span(1, 3, "PER")]),
    Sentence(["bad"], [Span(0, 1, "PER")]),
    Sentence(["unbelievable"] * 4, [Span(3, 4, "PER")]),
]
META = {"kind": "tagged_subwords", "tags": TAGS, "vocabulary": ["<unk>", "<pad>", "film"]}


@pytest.fixture
def settings(tiny_bert: Path) -> dict[str, Any]:  # noqa: F811
    return subwords.read_settings(tiny_bert / "tokenizer.json")


def batches(settings: dict[str, Any], sentences: list[Sentence] = SENTENCES, **loader: Any) -> SubwordBatches:
    arrays = with_pieces(arrays_of(sentences, TAGS, {"film": 2}), settings)
    split = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    train = loader.pop("train", False)
    options = SubwordLoader(**{"batch_size": 3, "eval_batch_size": 8} | loader)
    return SubwordBatches(split, META | {"tokenizer": settings}, options, train=train)


def rows(of: SubwordBatches, settings: dict[str, Any]) -> dict[int, list[tuple[str, str]]]:
    """Of each sentence, by its index, each word's first piece and tag."""
    names = subwords.vocabulary(settings)
    found = {}
    for order, batch in zip(of.order(), of, strict=True):
        pieces, _, firsts, _, lengths, tags = batch
        for row, index in enumerate(order.tolist()):
            words = range(int(lengths[row]))
            found[index] = [(names[pieces[row, firsts[row, i]]], TAGS[tags[row, i]]) for i in words]
    return found


def test_each_word_has_its_first_piece_and_its_tag(settings: dict[str, Any]) -> None:
    assert rows(batches(settings), settings) == {
        0: [("a", "O"), ("good", "B-PER"), ("un", "E-PER"), ("film", "O"), (".", "O")],
        1: [("bad", "S-PER")],
        2: [("un", "O"), ("un", "O"), ("un", "O"), ("un", "S-PER")],
    }


def test_words_beyond_the_pieces_keep_their_tags(settings: dict[str, Any]) -> None:
    """Two places go to [CLS] and [SEP]: of `unbelievable` four times, three pieces each, five pieces remain."""
    cut = batches(settings, max_pieces=7)
    assert rows(cut, settings)[2] == [("un", "O"), ("un", "O"), ("##believ", "O"), ("##believ", "S-PER")]
    assert max(int(batch[1].max()) for batch in cut) == 7


def test_a_training_sentence_is_cut_between_words(settings: dict[str, Any]) -> None:
    cut = batches(settings, train=True, max_words=3)
    pieces, piece_lengths, _, _, lengths, tags = next(iter(cut))
    assert sorted(lengths.tolist()) == [1, 3, 3]
    by_length = dict(zip(piece_lengths.tolist(), tags.tolist(), strict=True))
    assert by_length == {
        3: [TAGS.index("S-PER"), 0, 0],
        7: [0, TAGS.index("B-PER"), TAGS.index("E-PER")],
        11: [0, 0, 0],
    }
    assert pieces.shape == (3, 11)


def test_a_caller_s_sentences_become_the_inputs_of_training(settings: dict[str, Any]) -> None:
    signature = META | {"name": "x", "max_characters": 20, "max_pieces": 256, "tokenizer": settings}
    feed = KIND.read("A Good unbelievable Film.\n\nbad", signature)
    pair = batches(settings, [SENTENCES[0], SENTENCES[1]], eval_batch_size=2)
    (batch,) = list(pair)
    order = pair.order()[0].tolist()
    for name, values in zip(KIND.inputs.names, batch, strict=False):
        for row, index in enumerate(order):
            assert feed[name][index].tolist() == values[row].tolist(), name


def test_feeds_of_several_callers_are_joined_with_padding_that_has_no_effect(settings: dict[str, Any]) -> None:
    signature = META | {"name": "x", "max_characters": 20, "max_pieces": 256, "tokenizer": settings}
    one, other = (KIND.read(text, signature) for text in ("bad", "A Good unbelievable Film."))
    joined = KIND.inputs.joined([one, other])
    assert joined["lengths"].tolist() == [1, 5]
    assert joined["pieces"][0, : int(one["piece_lengths"][0])].tolist() == one["pieces"][0].tolist()
    assert np.array_equal(joined["firsts"][1], other["firsts"][0])
    trimmed = KIND.inputs.trimmed(*(torch.from_numpy(joined[name][:1]) for name in KIND.inputs.names))
    for name, value in zip(KIND.inputs.names, trimmed, strict=True):
        assert value.tolist() == one[name].tolist(), name


def test_a_limit_without_room_for_a_sentence_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(Failure, match=r"data.loader.max_pieces: 2 leaves no room for a sentence"):
        batches(settings, max_pieces=2)
