"""Subword tokenizers of pretrained text encoders: tokenizer.json, read by the `tokenizers` library without torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data.fetching.files import SourceError

FILE = "tokenizer.json"  # beside the raw archive
NAME = "subwords"  # of this way to tokenize, in meta.json and signature.json


def read_settings(path: Path, substitutions: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """A tokenizer.json as meta.json keeps it, without the truncation and padding that it may ask for.

    `substitutions`: patterns and what replaces them in a text before it is tokenized.

    `begin` and `end` are the ids around each text, `padding` and `unknown` those of the pieces of these names.

    Raises:
        SourceError: it is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library's errors have no class of their own
        raise SourceError(f"{path} is no tokenizer ({error}): give a tokenizer.json of a fast tokenizer") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    example = tokenizer.encode("a")
    inner = [i for i, special in enumerate(example.special_tokens_mask) if not special]
    return {
        "name": NAME,
        "substitutions": [list(rule) for rule in substitutions],
        "begin": example.ids[: inner[0]],
        "end": example.ids[inner[-1] + 1 :],
        "padding": _id_of(tokenizer, "[PAD]", "<pad>"),
        "unknown": _id_of(tokenizer, "[UNK]", "<unk>"),
        "json": tokenizer.to_str(),
    }


def _id_of(tokenizer: Any, *pieces: str) -> int:
    """The id of the first piece that the vocabulary has, or 0."""
    return next((id for piece in pieces if (id := tokenizer.token_to_id(piece)) is not None), 0)


def vocabulary(settings: Mapping[str, Any]) -> list[str]:
    """The pieces in the order of their ids."""
    pieces = load_tokenizer(settings["json"]).get_vocab()
    return sorted(pieces, key=pieces.__getitem__)


def encode(texts: Sequence[str], settings: Mapping[str, Any]) -> list[list[int]]:
    """The pieces of each text as ids, without the ids around them; on all cores. An empty text is an unknown piece."""
    for pattern, replacement in settings["substitutions"]:
        texts = [re.sub(pattern, replacement, text) for text in texts]
    encodings = load_tokenizer(settings["json"]).encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids or [settings["unknown"]] for encoding in encodings]


def decode(ids: Sequence[int], settings: Mapping[str, Any]) -> str:
    """A text from its pieces."""
    text: str = load_tokenizer(settings["json"]).decode(list(ids), skip_special_tokens=False)
    return text


@functools.lru_cache(maxsize=4)
def load_tokenizer(content: str) -> Any:
    """The tokenizer that a tokenizer.json describes."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(content)
