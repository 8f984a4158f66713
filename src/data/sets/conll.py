"""Sentences with entities: CoNLL's columns, or JSON lines with spans of characters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np

from src.common.tag_schemes import Span, TagError, parts_of, recognise, spans_of, tag_names
from src.configuration.schema import PositiveInt, Pretrained, SplitSeed, ValFraction
from src.data import subwords
from src.data.fetching.archives import read_archive
from src.data.fetching.files import SourceError
from src.data.folders import SPLIT_OF
from src.data.kinds.tagged import Sentence, Token, arrays_of, normalised, tokenize
from src.data.kinds.tagged_subwords import with_pieces
from src.data.packed import PADDING, SPLITS, UNKNOWN, Packed, duplicates

DOCUMENT = "-DOCSTART-"
COLUMNS = (".txt", ".conll", ".iob", ".iob2", ".bio", ".tsv")
JSON_LINES = (".jsonl", ".json")
NAMES = SPLIT_OF | {"testa": "val", "testb": "test"}  # CoNLL-2003 as distributed: eng.train, eng.testa, eng.testb
OTHER_TEST = "_test"  # ends the names of further test sets: conllpp_test.txt


class ConllFiles:
    """Reads a folder or an archive of one file per split: `train.txt`, `test.txt` and optionally `valid.txt`.

    A file holds CoNLL's columns (the word first, its tag last, an empty line behind each sentence) or, if it ends in
    `.jsonl`, a JSON object a line. Further test sets, `NAME_test.txt`, become splits that evaluate reports as well.
    Without a validation file whole documents of the training file are held out, or sentences where it has fewer than
    ten documents. The vocabulary is the `vocabulary` most frequent words of the training part, in lower case with each
    digit a 0, after `<unk>` and `<pad>`.
    """

    kind = "tagged"
    archive_name = "conll2003.zip"
    sample: ClassVar[str] = "src.data.samples.sentences"

    def __init__(
        self,
        *,
        scheme: Literal["iob2", "iobes"] = "iobes",
        vocabulary: PositiveInt = 50000,
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        self.scheme = scheme
        self.vocabulary = vocabulary
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def pack(self, archive: Path) -> Packed:
        """Parses and checks the archive.

        Raises:
            SourceError: a split is missing, a file can't be read, or its tags are not a valid sequence.
        """
        unused: Counter[str] = Counter()
        parts: dict[str, list[Sentence]] = {}
        names: dict[str, str] = {}
        for name, content in read_archive(archive):
            split, reason = _split_of(name)
            if split is None:
                unused[reason] += 1
                continue
            if split in names:
                raise SourceError(f"{archive}: both {names[split]} and {name} are the {split} split: keep one")
            names[split] = name
            parts[split] = parse(content, name, f"{archive}: {name}")
        for split in ("train", "test"):
            if split not in parts:
                raise SourceError(f"{archive}: no {split}.txt or {split}.jsonl in it; see docs/your-data.md")
        if "val" not in parts:
            parts["train"], parts["val"] = self._held_out(parts["train"], archive)
        types = sorted({span.type for sentence in parts["train"] for span in sentence.spans})
        if not types:
            raise SourceError(f"{archive}: {names['train']} has no entity: its last column, or its spans, name them")
        for split, sentences in parts.items():
            refuse_unknown_types(sentences, types, f"{archive}: {names.get(split, split)}")
        counts = Counter(normalised(word) for sentence in parts["train"] for word in sentence.words)
        vocabulary = [UNKNOWN, PADDING, *(word for word, _ in counts.most_common(self.vocabulary))]
        tags = tag_names(types, self.scheme)
        ids = {word: number for number, word in enumerate(vocabulary)}
        meta = {
            "kind": self.kind,
            "classes": types,
            "tags": tags,
            "vocabulary": vocabulary,
            "duplicates": duplicates({k: ["\n".join(s.words).encode() for s in parts[k]] for k in SPLITS}),
        }
        others = sorted(parts.keys() - set(SPLITS))
        splits = {split: arrays_of(parts[split], tags, ids) for split in (*SPLITS, *others)}
        return Packed(splits, meta, unused)

    def _held_out(self, sentences: list[Sentence], archive: Path) -> tuple[list[Sentence], list[Sentence]]:
        """Training sentences and those held out for validation."""
        if len(sentences) < 2:
            raise SourceError(f"{archive}: one training sentence and no valid.txt: give at least two, val takes one")
        documents = [sentence.document for sentence in sentences]
        groups = documents if len(set(documents)) >= 10 else list(range(len(sentences)))
        sizes = Counter(groups)
        target = self.val_fraction * len(sentences)
        held: set[int] = set()
        count = 0
        for group in np.random.default_rng(self.split_seed).permutation(list(sizes)).tolist():
            if held and (count + sizes[group] > target or len(held) == len(sizes) - 1):
                break
            held.add(group)
            count += sizes[group]
        is_held = [group in held for group in groups]
        train = [sentence for sentence, out in zip(sentences, is_held, strict=True) if not out]
        return train, [sentence for sentence, out in zip(sentences, is_held, strict=True) if out]


class ConllSubwords(ConllFiles):
    """The same files, whose words are also cut into the subwords of a text encoder by its `tokenizer`."""

    kind = "tagged_subwords"

    def __init__(
        self,
        *,
        tokenizer: Pretrained,
        scheme: Literal["iob2", "iobes"] = "iobes",
        vocabulary: PositiveInt = 50000,
        val_fraction: ValFraction = 0.1,
        split_seed: SplitSeed = 0,
    ) -> None:
        super().__init__(scheme=scheme, vocabulary=vocabulary, val_fraction=val_fraction, split_seed=split_seed)
        self.tokenizer = tokenizer

    def pack(self, archive: Path) -> Packed:
        """As the base; the tokenizer lies beside the archive."""
        packed = super().pack(archive)
        settings = subwords.read_settings(archive.with_name(subwords.FILE))
        splits = {split: with_pieces(arrays, settings) for split, arrays in packed.splits.items()}
        sizes = {"tokenizer": settings, "pieces": len(subwords.vocabulary(settings))}
        return replace(packed, splits=splits, meta=packed.meta | sizes)


def _split_of(name: str) -> tuple[str | None, str]:
    """The split that a file of an archive is, or the reason why it is none."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return None, "hidden"
    stem, suffix = path.stem, path.suffix.lower()
    if suffix.removeprefix(".") in NAMES:  # eng.train
        return NAMES[suffix.removeprefix(".")], ""
    if suffix not in (*COLUMNS, *JSON_LINES):
        return None, "of another kind"
    if stem in NAMES:
        return NAMES[stem], ""
    if stem.endswith(OTHER_TEST):
        return stem.removesuffix(OTHER_TEST), ""
    return None, "not named after a split"


def read_sentences(path: Path) -> list[Sentence]:
    """The sentences of a single file.

    Raises:
        SourceError: it can't be read, or its tags are not a valid sequence.
    """
    try:
        return parse(path.read_bytes(), path.name, str(path))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}: name a file of CoNLL's columns or of JSON lines") from None


def refuse_unknown_types(sentences: Iterable[Sentence], types: Sequence[str], name: str) -> None:
    """Refuses entities of types that the training part lacks.

    Raises:
        SourceError: naming the type.
    """
    if unknown := sorted({span.type for sentence in sentences for span in sentence.spans} - set(types)):
        raise SourceError(
            f"{name} has the type {unknown[0]!r} that the training part lacks, which has {', '.join(types)}: rename it"
        )


def parse(content: bytes, name: str, where: str) -> list[Sentence]:
    """The sentences of a file; `where` names it in messages.

    Raises:
        SourceError: it is not UTF-8, holds no sentence, or a line is wrong.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8 (byte {error.start}): convert it") from None
    read = parse_json_lines if PurePosixPath(name).suffix.lower() in JSON_LINES else parse_columns
    sentences = read(text, where)
    if not sentences:
        raise SourceError(f"{where} holds no sentence: remove it, or write a word and its tag on each line")
    return sentences


def parse_columns(text: str, where: str) -> list[Sentence]:
    """CoNLL's columns: a word and its tag on each line, the first and the last column.

    Raises:
        SourceError: naming the line that is wrong.
    """
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    lines: list[list[int]] = [[]]
    documents = [0]
    document = -1
    # Not splitlines, for which a word's own U+0085 or U+2028 would end a line.
    for number, line in enumerate(text.split("\n"), 1):
        columns = line.split()
        if not columns or columns[0] == DOCUMENT:
            if columns:
                document += 1
            if words[-1]:
                words.append([])
                tags.append([])
                lines.append([])
                documents.append(0)
            continue
        if len(columns) < 2:
            raise SourceError(f"{where}, line {number}: {columns[0]!r} stands alone: give a word and its tag")
        words[-1].append(columns[0])
        tags[-1].append(columns[-1])
        lines[-1].append(number)
        documents[-1] = max(0, document)
    if not words[-1]:
        for column in (words, tags, lines, documents):
            column.pop()
    return [
        Sentence(sentence, spans, number)
        for sentence, spans, number in zip(words, _spans(tags, lines, where), documents, strict=True)
    ]


def _spans(tags: list[list[str]], lines: list[list[int]], where: str) -> list[list[Span]]:
    """Each sentence's entities; `lines`: the line of each word, for messages."""
    for sentence, numbers in zip(tags, lines, strict=True):
        for tag, number in zip(sentence, numbers, strict=True):
            _refuse_no_tag(tag, f"{where}, line {number}")
    scheme = recognise(tags)
    entities: list[list[Span]] = []
    for sentence_tags, numbers in zip(tags, lines, strict=True):
        try:
            entities.append(spans_of(sentence_tags, scheme))
        except TagError as error:
            raise SourceError(f"{where}, line {numbers[error.position]}: {error}: mend the tags") from None
    return entities


def _refuse_no_tag(tag: str, where: str) -> None:
    try:
        parts_of(tag)
    except ValueError as error:
        raise SourceError(f"{where}: {error}: mend the last column") from None


def parse_json_lines(text: str, where: str) -> list[Sentence]:
    """JSON lines: `{"text": TEXT, "spans": [{"start": 0, "end": 5, "label": TYPE}, ...]}`, ends exclusive.

    Each line is one sentence, cut into words as `src.predict` does it, and besides where an entity begins or ends
    within such a word.

    Raises:
        SourceError: naming the line that is wrong.
    """
    sentences: list[Sentence] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            spans = [(int(s["start"]), int(s["end"]), str(s["label"])) for s in content["spans"]]
            sentence = str(content["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(
                f"{where}, line {number} is no object with text and spans of start, end, label ({error!r}): mend it"
            ) from None
        sentences.append(_aligned(sentence, sorted(spans), f"{where}, line {number}", len(sentences)))
    return sentences


def _aligned(text: str, spans: list[tuple[int, int, str]], where: str, number: int) -> Sentence:
    """A text with spans of characters as words with spans of words."""
    last = 0
    for start, end, label in spans:
        if not last <= start < end <= len(text):
            reason = "overlaps the one before" if start < last and start < end <= len(text) else "is not in the text"
            raise SourceError(f"{where}: the span {start} to {end} ({label}) {reason}: mend it")
        last = end
    borders = sorted({border for start, end, _ in spans for border in (start, end)})
    tokens = [piece for token in tokenize(text) for piece in _cut(token, borders)]
    if not tokens:
        raise SourceError(f"{where}: the text has no word in it: remove the line")
    entities = []
    for start, end, label in spans:
        inside = [i for i, token in enumerate(tokens) if start <= token.start and token.end <= end]
        if not inside:
            raise SourceError(f"{where}: the span {start} to {end} ({label}) holds no word: mend it")
        entities.append(Span(inside[0], inside[-1] + 1, label))
    return Sentence([token.word for token in tokens], entities, number)


def _cut(token: Token, borders: Sequence[int]) -> list[Token]:
    """A word, cut at the borders within it."""
    at = [token.start, *(border for border in borders if token.start < border < token.end), token.end]
    return [Token(token.word[a - token.start : b - token.start], a, b) for a, b in pairwise(at)]
