"""The task of tagging: answers with characters' places, figures by type, pages; and once through all stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.common.errors import ConfigError
from src.common.tag_schemes import Span, is_allowed, tag_names
from src.configuration.composing import compose
from src.data.kinds.tagged import sentences_of
from src.models.tagger import FORBIDDEN
from src.predict import JsonWriter
from src.reporting import entities
from src.tasks import Request
from src.tasks.tagging import TASK, Paths, Probabilities, Scored, most_confident_mistakes
from tests.conftest import Run
from tests.test_conll import batches
from tests.test_runs import output_of
from tests.test_tagger import tagger

TAGS = tag_names(["LOC", "PER"], "iobes")
SIGNATURE: dict[str, Any] = {
    "name": "tiny",
    "tags": TAGS,
    "classes": ["LOC", "PER"],
    "paths": tagger().path_scores(),
}


def answer_with(text: str, tags: dict[str, str]) -> Any:
    """The answer where each of these words surely has its tag, all others `O`."""
    sentences = sentences_of(text)
    scores = np.zeros((len(sentences), max(map(len, sentences)) + 2, len(TAGS)), np.float32)
    for row, tokens in enumerate(sentences):
        for column, token in enumerate(tokens):
            scores[row, column, TAGS.index(tags.get(token.word, "O"))] = 30
    return TASK.decode([scores], Request(text), SIGNATURE)


def test_an_answer_marks_entities_and_says_at_which_characters_they_stand() -> None:
    text = "My name is Wolff.  New York's mayor (“Li”) lives\nin Łódź"
    tags = {"Wolff": "S-PER", "New": "B-LOC", "York": "E-LOC", "Li": "S-PER", "Łódź": "S-LOC"}
    answer = answer_with(text, tags)
    assert answer.lines == [
        "My name is [Wolff](PER).  [New York](LOC)'s mayor (“[Li](PER)”) lives",
        "in [Łódź](LOC)",
    ]
    assert [(text[row["start"] : row["end"]], row["entity"], row["type"]) for row in answer.rows] == [
        ("Wolff", "Wolff", "PER"),
        ("New York", "New York", "LOC"),
        ("Li", "Li", "PER"),
        ("Łódź", "Łódź", "LOC"),
    ]
    assert all(row["probability"] > 0.99 for row in answer.rows)


def test_a_text_without_an_entity_has_no_answers(capsys: pytest.CaptureFixture[str]) -> None:
    JsonWriter().write("Nothing.", answer_with("Nothing.", {}))
    assert json.loads(capsys.readouterr().out) == {"input": "Nothing.", "answers": []}


def test_on_a_terminal_entities_are_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    (line,) = answer_with("In Oslo.", {"Oslo": "S-LOC"}).lines
    assert line.startswith("In \x1b[1;97;48;2;0;114;178m Oslo \x1b[2mLOC")
    monkeypatch.setenv("NO_COLOR", "1")
    assert answer_with("In Oslo.", {"Oslo": "S-LOC"}).lines == ["In [Oslo](LOC)."]


def test_a_page_of_mistakes_escapes_words_and_marks_both_answers(tmp_path: Path) -> None:
    row = {
        "words": ["<b>", "Oslo", "Bank"],
        "true": [Span(1, 3, "ORG")],
        "predicted": [Span(1, 2, "LOC")],
        "mistake": "Oslo: LOC 99.0%",
    }
    entities.mistakes_page([row], ["LOC", "ORG"], tmp_path / "m.html", label="x & y", sample=True)
    page = (tmp_path / "m.html").read_text()
    assert "<b>true</b>&lt;b&gt; <mark" in page
    assert "Oslo Bank<small" in page
    assert "Oslo<small" in page
    assert "x &amp; y" in page
    assert "sample data" in page


def test_the_surest_mistakes_come_first_and_right_sentences_not_at_all() -> None:
    test = batches(train=False)
    names = test.meta["tags"]
    # Of `true` nothing is predicted in sentence 1; in sentence 2 its second word is, wrongly; sentence 3 is right.
    rows = []
    for index, sure, true, predicted in (
        (1, 2.0, [Span(0, 1, "X")], []),
        (2, 6.0, [], [Span(1, 2, "X")]),
        (3, 9.0, [Span(0, 1, "X")], [Span(0, 1, "X")]),
    ):
        scores = np.zeros((index + 1, len(names)), np.float32)
        scores[:, 0] = sure
        for span in predicted:
            scores[span.start, [0, 4]] = 0, sure
        rows.append(Scored(index, true, predicted, 0, index + 1, scores))
    table = [[0.0 if is_allowed(a, b, "iobes") else FORBIDDEN for b in (*names, None)] for a in (None, *names)]
    values = np.array(table)
    paths = Paths(values[0, :-1], values[1:, :-1], values[1:, -1])
    mistakes = most_confident_mistakes(rows, test, paths, 5)
    assert [row["words"][0] for row in mistakes] == ["3.0", "2.0"]
    assert mistakes[0]["mistake"].startswith("3.1: X ")
    assert mistakes[1]["mistake"].startswith("2.0: no entity, is X ")
    confidence = Probabilities(rows[1].scores, paths).of([4], 1)
    assert mistakes[0]["mistake"].endswith(f" {confidence:.1%}")
    assert len(most_confident_mistakes(rows, test, paths, 1)) == 1


def test_a_test_set_of_a_wrong_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.other_tests"):
        compose(["experiment=conll_lstm", "output=out", "evaluation.other_tests={a/b: x.txt}"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tagger_goes_through_all_stages(clone: Path, run: Run) -> None:
    small = ("trainer.max_epochs=1", "trainer.threads=1", "export.latency_seconds=0.05", "model.hidden=20")
    (clone / "more.conll").write_text("Anna I-PER\nlives O\nin O\nOslo I-LOC\n")
    other = "evaluation.other_tests={more: more.conll}"
    done = run("python", "-m", "src.train", "+experiment=conll_lstm", *small, other)
    output = output_of(done.stdout)
    for stage in ("evaluate", "export"):
        run("python", "-m", f"src.{stage}", "-cp", f"../{output}", "-cn", "config")
    folder = clone / output
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"f1", "f1_PER", "f1_on_unseen", "f1_on_more"} <= metrics.keys()
    assert metrics["entities_of_more"] == 2
    assert metrics["accuracy"] > 0.5
    files = {path.name for path in (folder / "evaluation").iterdir()}
    assert files == {"confusion.png", "curves.png", "entities.md", "mistakes.html"}

    text = "My name is Wolff. I live in Berlin"
    code = "import sys, src.predict as p; p.main(); print('torch' in sys.modules)"
    shown = run("python", "-c", code, f"{output}/export", text, "--format", "json").stdout.splitlines()
    assert shown[-1] == "False"
    answer = json.loads(shown[0])
    assert answer["input"] == text
    assert all(text[row["start"] : row["end"]] == row["entity"] for row in answer["answers"])
    several = run("python", "-m", "src.predict", f"{output}/export", text, "Oslo", "--format", "json").stdout
    assert json.loads(several.splitlines()[0]) == answer

    (clone / "broken.conll").write_text("Oslo LOC\n")
    refused = run(
        *("python", "-m", "src.evaluate", "-cp", f"../{output}", "-cn", "config"),
        "evaluation.other_tests={more: broken.conll}",
        check=False,
    )
    assert refused.returncode != 0
    assert "broken.conll, line 1: the tag 'LOC' is neither" in refused.stderr
