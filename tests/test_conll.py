"""CoNLL's files and JSON lines: words and tags that never lose step, and refusals that name file and line."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from src.common.errors import Failure
from src.common.tag_schemes import Span, scheme_of, spans_of
from src.data.fetching.files import SourceError
from src.data.kinds.tagged import (
    KIND,
    Sentence,
    TaggedBatches,
    TaggedLoader,
    arrays_of,
    feed_of,
    sentences_of,
    tokenize,
    words_of,
)
from src.data.packed import Packed
from src.data.samples import sentences as sample
from src.data.sets.conll import ConllFiles, read_sentences
from tests.tiny_data import write_tar

TRAIN = """-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
lives VBZ B-VP O
in IN B-PP O
Oslo NNP B-NP B-LOC
. . O O

-DOCSTART- -X- -X- O

New NNP B-NP B-LOC
York NNP I-NP I-LOC
won VBD B-VP O
"""
TEST = "Oslo X Y I-LOC\nlost X Y O\n"  # IOB1


def packed(tmp_path: Path, **options: Any) -> Packed:
    files = {"mine/train.txt": TRAIN.encode(), "mine/valid.txt": TEST.encode(), "mine/test.txt": TEST.encode()}
    return ConllFiles(**options).pack(write_tar(tmp_path / "c.tar", files))


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}


def decoded(data: Packed, split: str) -> list[tuple[list[str], list[Span]]]:
    """Each sentence's words and entities, read back from the arrays."""
    arrays, names = tensors(data.splits[split]), data.meta["tags"]
    tags = [names[tag] for tag in arrays["tags"].tolist()]
    offsets = arrays["offsets"].tolist()
    return [
        (words_of(arrays, i), spans_of(tags[offsets[i] : offsets[i + 1]], scheme_of(names)))
        for i in range(KIND.count(arrays))
    ]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["iob2", "iobes"])
def test_words_and_entities_are_read_back_from_the_arrays(scheme: str, tmp_path: Path) -> None:
    data = packed(tmp_path, scheme=scheme)
    assert decoded(data, "train") == [
        (["Peter", "lives", "in", "Oslo", "."], [Span(0, 1, "PER"), Span(3, 4, "LOC")]),
        (["New", "York", "won"], [Span(0, 2, "LOC")]),
    ]
    assert decoded(data, "test") == [(["Oslo", "lost"], [Span(0, 1, "LOC")])]
    assert data.splits["train"]["documents"].tolist() == [0, 1]
    assert data.meta["classes"] == ["LOC", "PER"]


def test_the_vocabulary_is_of_the_training_part_in_lower_case_with_digits_as_zeros(tmp_path: Path) -> None:
    files = {"train.txt": b"Oslo B-LOC\n1996 O\nOSLO B-LOC\n", "valid.txt": b"Rome B-LOC\n", "test.txt": b"1812 O\n"}
    data = ConllFiles(vocabulary=1).pack(write_tar(tmp_path / "c.tar", files))
    assert data.meta["vocabulary"] == ["<unk>", "<pad>", "oslo"]
    data = ConllFiles().pack(write_tar(tmp_path / "c.tar", files))
    assert data.meta["vocabulary"] == ["<unk>", "<pad>", "oslo", "0000"]
    assert [data.splits[split]["words"].tolist() for split in ("train", "val", "test")] == [[2, 3, 2], [0], [3]]


def test_a_zip_a_tar_and_the_names_of_the_shared_task_are_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("eng.train", "eng.testa", "eng.testb", "conllpp_test.txt", "metadata.txt", ".hidden_test.txt"):
            file.writestr(name, TRAIN if name == "eng.train" else TEST)
    (tmp_path / "c.zip").write_bytes(buffer.getvalue())
    data = ConllFiles().pack(tmp_path / "c.zip")
    assert {split: KIND.count(arrays) for split, arrays in data.splits.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
        "conllpp": 1,
    }
    assert data.unused == {"not named after a split": 1, "hidden": 1}


def test_without_a_validation_file_whole_documents_are_held_out(tmp_path: Path) -> None:
    documents = [
        "-DOCSTART- O\n\n" + "".join(f"w{number} B-X\n\n" for _ in range(1 + number % 3)) for number in range(40)
    ]
    archive = write_tar(tmp_path / "c.tar", {"train.txt": "".join(documents).encode(), "test.txt": b"a B-X\n"})
    data = ConllFiles(val_fraction=0.2).pack(archive)
    words = {split: {word for sentence, _ in decoded(data, split) for word in sentence} for split in ("train", "val")}
    assert not words["train"] & words["val"]
    assert 0.1 < len(words["val"]) / 40 < 0.3
    assert np.array_equal(ConllFiles(val_fraction=0.2).pack(archive).splits["val"]["text"], data.splits["val"]["text"])


def test_json_lines_are_cut_into_words_and_at_the_borders_of_spans(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"text": "Berlin-based Siemens AG, of course.", "spans": [[0, 6, "LOC"], [13, 23, "ORG"]]},
        {"text": " Wolff", "spans": [[0, 6, "PER"]]},
        {"text": "Nothing.", "spans": []},
    ]
    for line in lines:
        line["spans"] = [{"start": a, "end": b, "label": c} for a, b, c in line["spans"]]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [(sentence.words, sentence.spans) for sentence in read_sentences(path)] == [
        (
            ["Berlin", "-based", "Siemens", "AG", ",", "of", "course", "."],
            [Span(0, 1, "LOC"), Span(2, 4, "ORG")],
        ),
        (["Wolff"], [Span(0, 1, "PER")]),
        (["Nothing", "."], []),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "Oslo B-LOC\n\nPeter B-PER\nBlack I-LOC\n",
            "a.txt, line 4: I-LOC follows B-PER, where IOB2 has B-LOC first: mend the tags",
        ),
        ("a.txt", "a I-X\n\nb B-X\nc I-Y\n", "a.txt, line 3: B-X follows the beginning of .* IOB1 has I-X"),
        ("a.txt", "a B-X\nb O\nc S-X\n", "a.txt, line 1: B-X begins .* no E-X ends: mend the tags"),
        ("a.txt", "Oslo\n", "a.txt, line 1: 'Oslo' stands alone"),
        ("a.txt", "Oslo LOC\n", "a.txt, line 1: the tag 'LOC' is neither"),
        ("a.txt", "-DOCSTART- O\n\n", "a.txt holds no sentence"),
        ("a.jsonl", '{"text": "a"}\n', "a.jsonl, line 1 is no object with text and spans"),
        ("a.jsonl", '\n{"text": "ab", "spans": [{"start": 1, "end": 3, "label": "X"}]}', "line 2: .*1 to 3.* not in"),
        (
            "a.jsonl",
            '{"text": "a b", "spans": [{"start": 0, "end": 3, "label": "X"}, {"start": 2, "end": 3, "label": "X"}]}',
            "overlaps the one before",
        ),
        ("a.jsonl", '{"text": "a  b", "spans": [{"start": 1, "end": 2, "label": "X"}]}', "holds no word"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message) as error:
        read_sentences(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.txt": b"a B-X\n"}, "no test.txt or test.jsonl"),
        ({"train.txt": b"a O\n\nb O\n", "test.txt": b"a O\n"}, "train.txt has no entity"),
        (
            {"train.txt": b"a B-X\n", "valid.txt": b"a O\n", "test.txt": b"a B-Y\n"},
            "test.txt has the type 'Y' that the training part",
        ),
        ({"train.txt": b"a B-X\n", "test.txt": b"a O\n"}, "one training sentence and no valid.txt"),
        (
            {"train.txt": b"a B-X\n", "b/train.conll": b"a O\n", "test.txt": b"a O\n"},
            "both train.txt and b/train.conll",
        ),
        ({"train.txt": b"\xff B-X\n", "test.txt": b"a O\n"}, "train.txt is not UTF-8"),
    ],
)
def test_an_archive_that_is_no_data_set_is_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "c.tar", files)
    with pytest.raises(SourceError, match=message) as error:
        ConllFiles().pack(archive)
    assert str(archive) in str(error.value)


# --- words of raw texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("My name is Wolff.", ["My", "name", "is", "Wolff", "."]),
        ("The U.S. and J. Smith", ["The", "U.S.", "and", "J.", "Smith"]),
        ("O'Neill's AT&T doesn't", ["O'Neill", "'s", "AT&T", "doesn", "'t"]),
        ("on 1996-08-22, 3.5 to 10,000", ["on", "1996-08-22", ",", "3.5", "to", "10,000"]),
        ("(Berlin-based)“Łódź”", ["(", "Berlin-based", ")", "“", "Łódź", "”"]),
        ("the 1990s, 22nd", ["the", "1990s", ",", "22nd"]),
        ("  \n ", []),
        ("a_b c++ x²", ["a_b", "c", "+", "+", "x²"]),
    ],
)
def test_a_text_is_cut_into_words_where_they_stand(text: str, words: list[str]) -> None:
    tokens = tokenize(text)
    assert [token.word for token in tokens] == words
    assert all(text[token.start : token.end] == token.word for token in tokens)
    assert sum(len(token.word) for token in tokens) == len("".join(text.split()))


def test_sentences_end_at_marks_before_a_blank_and_at_empty_lines() -> None:
    text = 'He left. "Why?" Nobody knows. It cost 3.5 million, e.g. in Oslo\n\nA headline\nwith a second line'
    assert [" ".join(token.word for token in sentence) for sentence in sentences_of(text)] == [
        "He left .",
        '" Why ? "',
        "Nobody knows .",
        "It cost 3.5 million , e.g. in Oslo",
        "A headline with a second line",
    ]


def test_a_text_without_a_word_and_a_missing_file_are_refused() -> None:
    signature = {"name": "x", "vocabulary": ["<unk>", "<pad>"], "max_characters": 9}
    for source, message in ((None, "wants a text"), (" ", "no word"), ("gone.txt", "no such file")):
        with pytest.raises(Failure, match=message):
            KIND.read(source, signature)


# --- batches ----------------------------------------------------------------------------------------------------------

LONG = "internationally"  # 15 bytes


def batches(train: bool = True, **options: Any) -> TaggedBatches:
    """Ten sentences of one to ten words; word i of a sentence of n words is `n.i`, and is an entity where i is even."""
    words = [[f"{length}.{position}" for position in range(length)] for length in range(1, 11)]
    spans = [[Span(i, i + 1, "X") for i in range(0, length, 2)] for length in range(1, 11)]
    sentences = [Sentence(w, s) for w, s in zip(words, spans, strict=True)]
    vocabulary = ["<unk>", "<pad>", "0.0", LONG]
    meta = {"kind": "tagged", "vocabulary": vocabulary, "tags": ["O", "B-X", "I-X", "E-X", "S-X"]}
    ids = {word: number for number, word in enumerate(vocabulary)}
    loader = TaggedLoader(**{"batch_size": 4, "eval_batch_size": 4, **options})
    return TaggedBatches(tensors(arrays_of(sentences, meta["tags"], ids)), meta, loader, train=train)


def text_at(characters: Tensor) -> str:
    return bytes(characters[characters > 0].tolist()).decode()


@pytest.mark.parametrize("train", [True, False])
def test_words_characters_and_tags_never_lose_step(train: bool) -> None:
    seen = []
    for words, characters, lengths, tags in batches(train):
        assert words.shape == tags.shape == characters.shape[:2] == (len(lengths), int(lengths.max()))
        for row, length in enumerate(lengths.tolist()):
            seen.append(length)
            for position in range(words.shape[1]):
                is_word = position < length
                assert text_at(characters[row, position]) == (f"{length}.{position}" if is_word else "")
                assert int(tags[row, position]) == (4 if is_word and position % 2 == 0 else 0)
                assert int(words[row, position]) == ((2 if length < 10 else 0) if is_word else 1)
    assert len(seen) == len(set(seen)) == (8 if train else 10)


def test_a_long_training_sentence_loses_words_and_tags_alike_and_evaluation_none() -> None:
    for words, characters, lengths, tags in batches(max_words=3):
        assert int(lengths.max()) <= 3
        assert words.shape == tags.shape == characters.shape[:2]
        for row, length in enumerate(lengths.tolist()):
            assert [int(tag) for tag in tags[row, :length]] == [4, 0, 4][:length]
    assert sorted(n for *_, lengths, _ in batches(False, max_words=3) for n in lengths.tolist()) == list(range(1, 11))


def test_a_long_word_loses_its_middle_in_training_and_in_predict_alike() -> None:
    sentence = Sentence([LONG, "a"], [])
    arrays = tensors(arrays_of([sentence], ["O"], {"<unk>": 0}))
    meta = {"kind": "tagged", "vocabulary": ["<unk>", "<pad>"], "tags": ["O"]}
    loader = TaggedLoader(batch_size=1, max_characters=7)
    (batch,) = TaggedBatches(arrays, meta, loader, train=False)
    assert text_at(batch[1][0, 0]) == "inte" + "lly"
    feed = feed_of([sentence.words], meta["vocabulary"], 7)
    for name, tensor in zip(KIND.inputs.names, batch, strict=False):
        assert np.array_equal(feed[name], tensor.numpy()), name


def test_the_order_and_the_dropped_words_depend_on_seed_and_epoch_alone() -> None:
    def run(epoch: int, seed: int = 0) -> list[Tensor]:
        source = batches(word_dropout=2.0)
        source.seed = seed
        source.set_epoch(epoch)
        return [words for words, *_ in source]

    first, again, other, another = run(1), run(1), run(2), run(1, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for changed in (other, another):
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, changed, strict=True))


def test_a_word_is_dropped_the_more_often_the_rarer_it_is() -> None:
    sentences = [Sentence(["the"] * 9 + ["rare"], []) for _ in range(1)]
    arrays = tensors(arrays_of(sentences * 200, ["O"], {"<unk>": 0, "<pad>": 1, "the": 2, "rare": 3}))
    arrays["words"][9] = 2  # `rare` occurs 199 times, `the` 1801 times
    meta = {"kind": "tagged", "vocabulary": ["<unk>", "<pad>", "the", "rare"], "tags": ["O"]}
    loader = TaggedLoader(batch_size=200, word_dropout=199.0)
    ((words, *_),) = TaggedBatches(arrays, meta, loader, train=True)
    dropped = (words == 0).float()
    assert float(dropped[:, 9].mean()) == pytest.approx(0.5, abs=0.1)
    assert float(dropped[:, :9].mean()) == pytest.approx(0.1, abs=0.03)


def test_feeds_of_several_texts_are_joined_with_padding() -> None:
    vocabulary = ["<unk>", "<pad>", "a", "bc"]
    feeds = [feed_of([["a"]], vocabulary, 9), feed_of([["bc", "a", "a"]], vocabulary, 9)]
    joined = KIND.inputs.joined(feeds)
    assert joined["lengths"].tolist() == [1, 3]
    assert joined["words"].tolist()[1] == [3, 2, 2]
    assert joined["characters"].shape == (2, 3, 2)
    assert joined["characters"][0, 0].tolist() == [97, 0]


# --- the sample -------------------------------------------------------------------------------------------------------


def test_the_sample_is_in_the_official_layout_and_has_ambiguous_names(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        sample.draw(tmp_path / name, train=600, val=30, test=200)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    data = ConllFiles().pack(tmp_path / "a.zip")
    assert data.meta["classes"] == ["LOC", "MISC", "ORG", "PER"]
    assert set(data.splits) == {"train", "val", "test", "unseen"}
    types: dict[str, Counter[str]] = {}
    names: dict[str, set[str]] = {}
    for split in ("train", "test", "unseen"):
        for words, spans in decoded(data, split):
            for span in spans:
                entity = " ".join(words[span.start : span.end])
                types.setdefault(entity, Counter())[span.type] += split == "train"
                if span.type == "PER" and not entity.isupper():
                    names.setdefault(split, set()).add(words[span.end - 1])
    assert len([name for name, counts in types.items() if len(+counts) == 3]) > 10  # person, place and club
    assert names["test"] & names["train"]
    assert not names["unseen"] & names["train"]
