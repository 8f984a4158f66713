"""Tagging of words: entities in sentences, counted as `conlleval` counts them."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from pydantic import Field

from src.common.files import write_text_atomically
from src.common.paths import input_path
from src.common.tag_schemes import Span, scheme_of, spans_of, tags_of
from src.configuration.metrics import Metric
from src.configuration.schema import Config, Evaluation, PositiveInt
from src.data import kinds
from src.data.batching import limited
from src.data.kinds.tagged import arrays_of, sentences_of, text_of, words_of
from src.data.kinds.tagged_subwords import with_pieces
from src.data.packed import SPLITS
from src.reporting import entities, plots, tables
from src.tasks import Answer, Evaluated, Request, Task

if TYPE_CHECKING:
    from torch import nn

    from src.data.batching import Batches
    from src.models.tagger import Tagging as TaggingModel

OTHER_BORDERS, NONE = "other borders", "none"  # of the confusion of types


class TaggingOptions(Evaluation):
    """What evaluate shows of a tagger, and further test sets."""

    mistakes: PositiveInt = Field(default=30, description="sentences with the most confident mistakes, shown")
    other_tests: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], str] = Field(
        default={}, description="further test sets, NAME: FILE of CoNLL's columns or of JSON lines"
    )


METRICS: Mapping[str, Metric] = {
    "f1": Metric("max", "F1 of entities", is_fraction=True, is_validated=True),
    "accuracy": Metric("max", "accuracy of words", is_fraction=True, is_validated=True),
    "loss": Metric("min", "loss", is_validated=True),
    "precision": Metric("max", "precision of entities", is_fraction=True),
    "recall": Metric("max", "recall of entities", is_fraction=True),
    "examples": Metric(None, "examples"),
    # Of CoNLL-2003's types and of further test sets that belong to it; figures of others have no better direction.
    **{f"f1_{name}": Metric("max", f"F1 of {name}", is_fraction=True) for name in ("LOC", "MISC", "ORG", "PER")},
    **{f"f1_on_{name}": Metric("max", f"F1 on {name}", is_fraction=True) for name in ("conllpp", "wikigold", "unseen")},
}


@dataclass(frozen=True)
class Paths:
    """Scores of tag sequences beside the words' own: of the first tag [K], of transitions [K, K], of the last tag."""

    start: np.ndarray
    transitions: np.ndarray  # from, to
    end: np.ndarray

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Paths:
        """Those of a signature.json, or of a model's `path_scores`."""
        return cls(*(np.array(content[name], np.float32) for name in ("start", "transitions", "end")))


def best_tags(scores: np.ndarray, paths: Paths) -> np.ndarray:
    """The tags of the best path (Viterbi) of a sentence: fp32 [T, K] -> int64 [T]."""
    state = scores[0] + paths.start
    origins = []
    for step in scores[1:]:
        total = state[:, None] + paths.transitions
        origins.append(total.argmax(0))
        state = total.max(0) + step
    tags = [int((state + paths.end).argmax())]
    for origin in reversed(origins):
        tags.append(int(origin[tags[-1]]))
    return np.array(tags[::-1], np.int64)


class Probabilities:
    """Probabilities of parts of a sentence's tag sequence, by sums over all paths; `scores` fp32 [T, K]."""

    def __init__(self, scores: np.ndarray, paths: Paths) -> None:
        self.scores, self.paths = scores.astype(np.float64), paths
        begun = [self.scores[0] + paths.start]
        for step in self.scores[1:]:
            begun.append(_log_sum(begun[-1][:, None] + paths.transitions, 0) + step)
        ended = [self.scores[-1] + paths.end]
        for step in self.scores[-2::-1]:
            ended.append(_log_sum(ended[-1][None, :] + paths.transitions, 1) + step)
        self.begun, self.ended = begun, ended[::-1]
        self.total = float(_log_sum(begun[-1] + paths.end, 0))

    def of(self, tags: Sequence[int], start: int) -> float:
        """The probability that the words from `start` on have these tags."""
        steps = zip(tags, tags[1:], range(start + 1, start + len(tags)), strict=False)
        inside = sum(self.paths.transitions[a, b] + self.scores[position, b] for a, b, position in steps)
        last = start + len(tags) - 1
        after = self.ended[last][tags[-1]] - self.scores[last, tags[-1]]
        return float(np.exp(min(0.0, self.begun[start][tags[0]] + inside + after - self.total)))


def _log_sum(values: np.ndarray, axis: int) -> np.ndarray:
    most = values.max(axis, keepdims=True)
    result: np.ndarray = np.log(np.exp(values - most).sum(axis)) + most.squeeze(axis)
    return result


@dataclass(frozen=True)
class Scored:
    """A sentence of a split with its true and its predicted entities."""

    index: int
    true: list[Span]
    predicted: list[Span]
    right_words: int
    words: int
    scores: np.ndarray  # fp32 [T, K]


class Tagging(Task):
    """Entities in sentences. A model answers scores of the tags of each word, fp32 [B, T, K]."""

    takes = ("tagged", "tagged_subwords")
    metrics = METRICS
    options = TaggingOptions
    outputs = ("scores",)

    def evaluate(
        self, model: nn.Module, test: Batches, config: Config, meta: Mapping[str, Any], folder: Path
    ) -> Evaluated:
        """Also F1 by type as `f1_TYPE`, and of further test sets as `f1_on_NAME`."""
        from src.data import packed

        options = config.evaluation
        assert isinstance(options, TaggingOptions)
        others = {name: _read(Path(input_path(path)), test) for name, path in options.other_tests.items()}
        for name in sorted(meta["splits"].keys() - set(SPLITS)):
            others.setdefault(name, _beside(packed.read_split(config.processed, name), test))
        limit = config.trainer.limit_test_batches
        title = plots.Title(label=config.label, sample=config.sample)
        evaluated = report(cast("TaggingModel", model), test, limit, options, folder, title)
        figures: dict[str, float] = {}
        for name, batches in others.items():
            total, _ = counted(list(scored(cast("TaggingModel", model), batches, limit)))
            figures |= {f"f1_on_{name}": total.f1, f"entities_of_{name}": float(total.actual)}
        return Evaluated(evaluated.metrics | figures, evaluated.pairs)

    def signature(self, model: nn.Module, meta: Mapping[str, Any], config: Config) -> dict[str, Any]:
        paths = cast("TaggingModel", model).path_scores()
        return super().signature(model, meta, config) | {"classes": meta["classes"], "paths": paths}

    def decode(self, outputs: Sequence[np.ndarray], request: Request, signature: Mapping[str, Any]) -> Answer:
        """The text with its entities marked, and each with the characters `start` to `end` where it stands."""
        text = text_of(request.source, signature)
        tags, paths = signature["tags"], Paths.of(signature["paths"])
        spans, rows = [], []
        for tokens, padded in zip(sentences_of(text), outputs[0], strict=True):
            scores = padded[: len(tokens)]
            best = best_tags(scores, paths)
            probabilities = Probabilities(scores, paths)
            for span in spans_of([tags[tag] for tag in best], scheme_of(tags)):
                start, end = tokens[span.start].start, tokens[span.end - 1].end
                probability = probabilities.of(best[span.start : span.end].tolist(), span.start)
                spans.append(Span(start, end, span.type))
                rows.append(
                    {
                        "entity": text[start:end],
                        "type": span.type,
                        "start": start,
                        "end": end,
                        "probability": round(probability, 4),
                    }
                )
        in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        return Answer(entities.marked(text, spans, signature["classes"], in_colour=in_colour).splitlines(), rows)

    def hub_tag(self, signature: Mapping[str, Any]) -> str:
        return "token-classification"

    def snippet(self, signature: Mapping[str, Any]) -> str:
        kind = kinds.load(signature["kind"])
        feed = ", ".join(f'"{name}": {name}' for name in kind.inputs.names)
        return f"""\
{kind.snippet(signature)}scores = session.run(None, {{{feed}}})[0]  # [batch, time, tags]
# The best path (Viterbi) maximises the scores of its tags and the scores `paths` in signature.json.
print(scores.shape)
"""


def scored(model: TaggingModel, batches: Batches, limit: int | float | None = None) -> Iterator[Scored]:
    """The sentences of a split, in the batches' order."""
    import torch

    names = batches.meta["tags"]
    scheme, paths = scheme_of(names), Paths.of(model.path_scores())
    for (*inputs, tags), indices in limited(batches, limit):
        with torch.inference_mode():
            outputs = model.answer(*inputs).cpu().numpy()
        rows = zip(indices.tolist(), inputs[-1].tolist(), tags.cpu().numpy(), outputs, strict=True)
        for index, length, actual, scores in rows:
            best = best_tags(scores[:length], paths)
            true, predicted = (
                spans_of([names[tag] for tag in sequence], scheme) for sequence in (actual[:length], best)
            )
            right = int((best == actual[:length]).sum())
            yield Scored(index, true, predicted, right, length, scores[:length])


@dataclass
class Counts:
    """How many entities are right, predicted and there."""

    right: int = 0
    predicted: int = 0
    actual: int = 0

    @property
    def precision(self) -> float:
        """The share of the predicted entities that are right; 0 without any."""
        return self.right / max(1, self.predicted)

    @property
    def recall(self) -> float:
        """The share of the true entities that are predicted rightly; 0 without any."""
        return self.right / max(1, self.actual)

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 0 without any entity."""
        return 2 * self.right / max(1, self.predicted + self.actual)


def counted(sentences: Sequence[Scored]) -> tuple[Counts, dict[str, Counts]]:
    """Counts of all entities and by type: first word, last word and type must be right."""
    total, by_type = Counts(), defaultdict[str, Counts](Counts)
    for sentence in sentences:
        for span in sentence.predicted:
            for counts in (total, by_type[span.type]):
                counts.predicted += 1
                if span in sentence.true:
                    counts.right += 1
        for span in sentence.true:
            for counts in (total, by_type[span.type]):
                counts.actual += 1
    return total, by_type


def report(
    model: TaggingModel,
    test: Batches,
    limit: int | float | None,
    options: TaggingOptions,
    folder: Path,
    title: plots.Title,
) -> Evaluated:
    """Writes entities.md (by type), confusion.png and mistakes.html into `folder`."""
    meta = test.meta
    types: list[str] = meta["classes"]
    sentences = list(scored(model, test, limit))
    total, by_type = counted(sentences)
    rows = [
        {
            "type": name,
            "precision": count.precision,
            "recall": count.recall,
            "f1": count.f1,
            "predicted": count.predicted,
            "actual": count.actual,
        }
        for name, count in (*((name, by_type[name]) for name in types), ("all", total))
    ]
    write_text_atomically(folder / "entities.md", tables.markdown(rows, list(rows[0])))
    pairs = [pair for sentence in sentences for pair in confused(sentence)]
    classes = [*types, OTHER_BORDERS, NONE]
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    for (actual, predicted), count in Counter(pairs).items():
        matrix[classes.index(actual), classes.index(predicted)] = count
    plots.confusion_matrix(matrix, classes, folder / "confusion.png", **title)
    entities.mistakes_page(
        most_confident_mistakes(sentences, test, Paths.of(model.path_scores()), options.mistakes),
        types,
        folder / "mistakes.html",
        **title,
    )
    words = sum(sentence.words for sentence in sentences)
    metrics = {
        "f1": total.f1,
        "precision": total.precision,
        "recall": total.recall,
        "accuracy": sum(sentence.right_words for sentence in sentences) / words,
        "examples": float(len(sentences)),
        **{f"f1_{name}": by_type[name].f1 for name in types},
    }
    return Evaluated(metrics, [{"actual": actual, "predicted": predicted} for actual, predicted in pairs])


def confused(sentence: Scored) -> list[tuple[str, str]]:
    """(actual, predicted) type of each true entity, and of each predicted one whose borders are none's."""
    pairs = []
    types = {(span.start, span.end): span.type for span in sentence.predicted}
    for span in sentence.true:
        predicted_type = types.get((span.start, span.end))
        pairs.append((span.type, predicted_type or (OTHER_BORDERS if _overlap(span, sentence.predicted) else NONE)))
    borders = {(span.start, span.end) for span in sentence.true}
    for span in sentence.predicted:
        if (span.start, span.end) not in borders:
            pairs.append((OTHER_BORDERS if _overlap(span, sentence.true) else NONE, span.type))
    return pairs


def _overlap(span: Span, others: Sequence[Span]) -> bool:
    return any(span.start < other.end and other.start < span.end for other in others)


def most_confident_mistakes(
    sentences: Sequence[Scored], batches: Batches, paths: Paths, count: int
) -> list[dict[str, Any]]:
    """The sentences whose worst mistake the model is surest of: rows for `entities.mistakes_page`.

    A mistake is a predicted entity that is not there, or a true one where nothing is predicted.
    """
    names: list[str] = batches.meta["tags"]
    ids = {name: number for number, name in enumerate(names)}
    ranked: list[tuple[float, str, Scored]] = []
    for sentence in sentences:
        invented = [span for span in sentence.predicted if span not in sentence.true]
        missed = [span for span in sentence.true if not _overlap(span, sentence.predicted)]
        if not (invented or missed):
            continue
        probabilities = Probabilities(sentence.scores, paths)
        best: tuple[float, str] = (-1.0, "")
        for span, is_missed in [*((span, False) for span in invented), *((span, True) for span in missed)]:
            length = span.end - span.start
            own = [] if is_missed else [Span(0, length, span.type)]
            tags = [ids[tag] for tag in tags_of(own, length, scheme_of(names))]
            text = " ".join(words_of(batches.split, sentence.index)[span.start : span.end])
            answer = f"no entity, is {span.type}" if is_missed else span.type
            confidence = probabilities.of(tags, span.start)
            best = max(best, (confidence, f"{text}: {answer} {confidence:.1%}"))
        ranked.append((*best, sentence))
    ranked.sort(key=lambda mistake: (-mistake[0], mistake[2].index))
    return [
        {
            "mistake": text,
            "words": words_of(batches.split, sentence.index),
            "true": sentence.true,
            "predicted": sentence.predicted,
        }
        for _, text, sentence in ranked[:count]
    ]


def _read(path: Path, like: Batches) -> Batches:
    """A file of sentences as batches for the same model."""
    import torch

    from src.data.sets.conll import read_sentences, refuse_unknown_types

    sentences = read_sentences(path)
    refuse_unknown_types(sentences, like.meta["classes"], str(path))
    vocabulary = {word: number for number, word in enumerate(like.meta["vocabulary"])}
    arrays = arrays_of(sentences, like.meta["tags"], vocabulary)
    if tokenizer := like.meta.get("tokenizer"):
        arrays = with_pieces(arrays, tokenizer)
    return _beside({key: torch.from_numpy(value.copy()) for key, value in arrays.items()}, like)


def _beside(split: dict[str, Any], like: Batches) -> Batches:
    return type(like)(split, like.meta, like.loader, train=False).to(like.split["words"].device)


TASK = Tagging()
