"""The CRF against sums over all paths, the figures against seqeval, and a tagger on which padding has no effect."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB2, IOBES
from torch import Tensor, nn

from src.common.tag_schemes import Scheme, is_allowed, scheme_of, spans_of, tag_names
from src.configuration.schema import AdamW, Constant
from src.data.kinds.tagged import KIND, feed_of
from src.exporting import onnx_export
from src.models.tagger import CRF, Affixes, CharacterCNN, CharacterLSTM, EntityF1, WordTagger, shapes_of
from src.tasks.tagging import Paths, Probabilities, Scored, best_tags, confused, counted

LENGTHS = torch.tensor([4, 1, 3])
SCHEMES: tuple[Scheme, ...] = ("iob2", "iobes")
VOCABULARY = ["<unk>", "<pad>", "peter", "lives", "in", "oslo", "."]


def crf_of(tags: list[str]) -> CRF:
    torch.manual_seed(0)
    crf = CRF(tags)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    return crf


def all_paths(crf: CRF, scores: Tensor) -> dict[tuple[int, ...], Tensor]:
    """The score of each path through one sentence, [T, K]."""
    start, transitions, end = crf.parameters_of_paths()
    paths = itertools.product(range(scores.shape[1]), repeat=len(scores))
    return {
        path: start[path[0]]
        + end[path[-1]]
        + sum(scores[position, tag] for position, tag in enumerate(path))
        + sum(transitions[a, b] for a, b in itertools.pairwise(path))
        for path in paths
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_likelihood_and_its_gradient_are_those_of_all_paths(scheme: Scheme) -> None:
    names = tag_names(["P"], scheme)
    crf = crf_of(names)
    scores = torch.randn(3, 4, len(names), requires_grad=True)
    tags = torch.zeros(3, 4, dtype=torch.int64)
    tags[0] = torch.tensor([names.index(name) for name in (["O", "B-P", "I-P", "O"], ["O", "B-P", "I-P", "E-P"])[
        scheme == "iobes"
    ]])  # fmt: skip
    losses = []
    for row, length in enumerate(LENGTHS.tolist()):
        paths = all_paths(crf, scores[row, :length])
        losses.append(torch.stack(list(paths.values())).logsumexp(0) - paths[tuple(tags[row, :length].tolist())])
    expected, actual = torch.stack(losses), crf(scores, tags, LENGTHS)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    weights = torch.tensor([1.0, 2.0, -3.0])
    inputs = [scores, *crf.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_the_likelihood_is_finite_where_scores_are_far_apart() -> None:
    names = tag_names(["P"], "iobes")
    crf, tags = crf_of(names), torch.tensor([[0, 4, 0, 0]])
    scores = torch.zeros(1, 4, len(names))
    scores[0, 1, 0], scores[0, 2, 4] = 300.0, 300.0
    scores.requires_grad_()
    loss = crf(scores, tags, torch.tensor([4]))
    paths = all_paths(crf, scores[0])
    expected = torch.stack(list(paths.values())).logsumexp(0) - paths[0, 4, 0, 0]
    torch.testing.assert_close(loss[0], expected, atol=1e-3, rtol=1e-6)
    loss.sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_best_path_is_valid_and_the_best_of_all_in_torch_and_in_numpy(scheme: Scheme) -> None:
    names = tag_names(["L", "P"], scheme)
    crf = crf_of(names)
    scores = 3 * torch.randn(3, 4, len(names))
    decoded = crf.decode(scores, LENGTHS)
    start, transitions, end = (values.detach().numpy() for values in crf.parameters_of_paths())
    for row, length in enumerate(LENGTHS.tolist()):
        paths = all_paths(crf, scores[row, :length])
        best = max(paths, key=lambda path: float(paths[path].detach()))
        assert tuple(decoded[row].tolist()) == best + (0,) * (4 - length)
        assert tuple(best_tags(scores[row, :length].numpy(), Paths(start, transitions, end)).tolist()) == best
        tags = [names[tag] for tag in best]
        assert all(is_allowed(a, b, scheme) for a, b in zip((None, *tags), (*tags, None), strict=True))


def test_probabilities_of_parts_are_sums_over_the_paths_that_hold_them() -> None:
    names = tag_names(["P"], "iobes")
    crf, scores = crf_of(names), torch.randn(4, len(names))
    values = [parameter.detach().numpy() for parameter in crf.parameters_of_paths()]
    probabilities = Probabilities(scores.numpy(), Paths(*values))
    paths = all_paths(crf, scores)
    total = torch.stack(list(paths.values())).logsumexp(0)
    for start, tags in ((0, (4,)), (1, (1, 3)), (0, (1, 2, 2, 3)), (3, (0,))):
        held = [score for path, score in paths.items() if path[start : start + len(tags)] == tags]
        expected = float((torch.stack(held).logsumexp(0) - total).exp().detach())
        assert probabilities.of(tags, start) == pytest.approx(expected, abs=1e-5)


def random_tags(names: list[str], rows: int, longest: int) -> tuple[list[list[str]], Tensor]:
    """Random valid sequences, as names and padded as numbers."""
    crf = crf_of(names)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (rows,), generator=random)
    decoded = crf.decode(4 * torch.randn(rows, longest, len(names), generator=random), lengths)
    return [
        [names[tag] for tag in row[:length]] for row, length in zip(decoded.tolist(), lengths.tolist(), strict=True)
    ], decoded


@pytest.mark.parametrize(("scheme", "theirs"), [("iob2", IOB2), ("iobes", IOBES)])
def test_f1_is_seqevals_in_strict_mode(scheme: Scheme, theirs: Any) -> None:
    names = tag_names(["L", "P"], scheme)
    true, actual = random_tags(names, 60, 7)
    # Half of the words' sentences are answered rightly, the others with another sentence of the same length.
    guess, predicted = list(true), actual.clone()
    for row in range(0, 60, 2):
        other = next((i for i in range(row + 1, 60) if len(true[i]) == len(true[row])), row)
        guess[row], predicted[row] = true[other], actual[other]
    precision, recall, f1, _ = precision_recall_fscore_support(true, guess, scheme=theirs, average="micro")
    assert 0.3 < f1 < 0.95
    metric = EntityF1(names)
    for part in (slice(0, 25), slice(25, 60)):
        metric.update(predicted[part], actual[part])
    assert float(metric.compute()) == pytest.approx(f1)
    total, types = counted(
        [
            Scored(i, spans_of(t, scheme), spans_of(g, scheme), 0, len(t), np.zeros((len(t), 1)))
            for i, (t, g) in enumerate(zip(true, guess, strict=True))
        ]
    )
    assert (total.precision, total.recall, total.f1) == pytest.approx((precision, recall, f1))
    by_type = precision_recall_fscore_support(true, guess, scheme=theirs, average=None)[2]
    assert [types[name].f1 for name in ("L", "P")] == pytest.approx(list(by_type))


def test_entities_are_counted_at_the_borders() -> None:
    """Two entities side by side are not one; a wrong border or type makes two mistakes."""
    true = [["B-P", "I-P", "O", "B-L"], ["B-L", "B-L", "O"], ["O", "O"]]
    guess = [["B-P", "O", "O", "B-L"], ["B-L", "I-L", "O"], ["B-P", "O"]]
    names = tag_names(["L", "P"], "iob2")
    numbers = [
        torch.tensor([[*(names.index(tag) for tag in row), *[0] * (4 - len(row))] for row in rows])
        for rows in (guess, true)
    ]
    metric = EntityF1(names)
    metric.update(*numbers)
    assert float(metric.compute()) == pytest.approx(1 / 4)
    scored = [
        Scored(i, spans_of(t, "iob2"), spans_of(g, "iob2"), 0, len(t), np.zeros((len(t), 1)))
        for i, (t, g) in enumerate(zip(true, guess, strict=True))
    ]
    total, types = counted(scored)
    assert (total.precision, total.recall) == (1 / 4, 1 / 4)
    assert (types["L"].right, types["L"].predicted, types["L"].actual) == (1, 2, 3)
    assert confused(scored[0]) == [("P", "other borders"), ("L", "L"), ("other borders", "P")]
    assert confused(scored[2]) == [("none", "P")]


def tagger(characters: Literal["cnn", "lstm"] = "cnn", layers: int = 1) -> WordTagger:
    torch.manual_seed(0)
    return WordTagger(
        {"vocabulary": VOCABULARY, "tags": tag_names(["L", "P"], "iobes"), "classes": ["L", "P"]},
        optimizer=AdamW(name="adamw", lr=1e-3),
        schedule=Constant(name="constant"),
        embedding=6,
        characters=characters,
        character_embedding=4,
        character_features=5,
        affixes=31,
        affix_embedding=3,
        hidden=5,
        layers=layers,
    ).eval()


SENTENCES = [["Peter", "lives", "in", "OSLO", "."], ["Å"], ["Norvex-based", "1996-08-22"]]


def inputs_of(sentences: list[list[str]], max_characters: int = 20) -> tuple[Tensor, ...]:
    feed = feed_of(sentences, VOCABULARY, max_characters)
    return tuple(torch.from_numpy(feed[name]) for name in KIND.inputs.names)


@pytest.mark.parametrize("characters", ["cnn", "lstm"])
@pytest.mark.parametrize("layers", [1, 2])
def test_scores_do_not_depend_on_the_padding(characters: Literal["cnn", "lstm"], layers: int) -> None:
    model = tagger(characters, layers)
    together = model.answer(*inputs_of(SENTENCES))
    assert together.shape == (3, 5, len(model.crf.start))
    for row, sentence in enumerate(SENTENCES):
        alone = model.answer(*inputs_of([sentence]))
        torch.testing.assert_close(together[row, : len(sentence)], alone[0], atol=1e-6, rtol=1e-5)
        assert not together[row, len(sentence) :].any()


@pytest.mark.parametrize("make", [lambda: CharacterCNN(4, 5), lambda: CharacterLSTM(4, 5), lambda: Affixes(31, 3)])
def test_characters_behind_a_words_end_have_no_effect(make: Any) -> None:
    torch.manual_seed(0)
    part = make()
    _, characters, _ = inputs_of([["Oslo", "a", "internationally"]])
    vectors = part(characters)
    assert vectors.shape == (1, 3, part.size)
    for column, word in enumerate(("Oslo", "a")):
        _, alone, _ = inputs_of([[word]])
        torch.testing.assert_close(part(alone)[0, 0], vectors[0, column], atol=1e-6, rtol=1e-5)


def test_affixes_heed_letters_and_place_but_not_their_case() -> None:
    part = Affixes(4096, 8)
    _, characters, _ = inputs_of([["Berlin", "BERLIN", "linber"]])
    first, capitals, other = part(characters)[0]
    assert torch.equal(first, capitals)
    assert not torch.equal(first[:8], other[:8])


def test_shapes_tell_how_a_word_is_written() -> None:
    words, characters, lengths = inputs_of([["Peter", "McDonald", "NATO", "ate", "1996-08-22", "é", "B2B"], ["a"]])
    shapes = shapes_of(characters, lengths)
    assert shapes.shape == (*words.shape, 9)
    rows = ["".join(str(int(value)) for value in row[:8]) for row in shapes[0]]
    assert rows == ["10010000", "11010000", "11100000", "00010000", "00001110", "00000001", "11101000"]
    torch.testing.assert_close(shapes[0, :, 8], torch.full((7,), 2 / 5))  # NATO and B2B, of five words with letters


@pytest.mark.parametrize("characters", ["cnn", "lstm"])
def test_the_graph_equals_the_model_at_other_batch_sizes_and_lengths(
    characters: Literal["cnn", "lstm"], tmp_path: Any
) -> None:
    model, path = tagger(characters), tmp_path / "model.onnx"
    onnx_export.write(model, KIND.inputs, ("scores",), [inputs_of([*SENTENCES, ["a", "b"]])], path)
    session = onnx_export.session(path, threads=1)
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "words": ["batch", "time"],
        "characters": ["batch", "time", "letters"],
        "lengths": ["batch"],
    }
    for sentences in (SENTENCES, SENTENCES[1:2], [["x"] * 40, *SENTENCES], [["a"], ["."]]):
        values = inputs_of(sentences)
        with torch.inference_mode():
            expected = onnx_export.answering(model)(*values)[0].numpy()
        np.testing.assert_allclose(session.run(None, onnx_export.feed(KIND.inputs, values))[0], expected, atol=1e-5)


def test_impossible_tags_stay_impossible_in_the_scores_of_paths() -> None:
    names = tag_names(["L", "P"], "iobes")
    scores = tagger().path_scores()
    for before, row in enumerate(scores["transitions"]):
        for after, score in enumerate(row):
            assert (score > -1000) == is_allowed(names[before], names[after], scheme_of(names))
