"""Subword tokenizers, of a pretrained text encoder or trained here, by the `tokenizers` library without torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data.fetching.files import SourceError
from src.data.packed import PADDING, UNKNOWN

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
    return _settings(tokenizer, substitutions)


def train(texts: Iterable[str], vocabulary: int, substitutions: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Trains byte-pair encoding on lower-cased bytes (Sennrich et al., 2016; Radford et al., 2019).

    Equal texts give the same pieces, whatever their order and the number of threads: pairs are merged by their count,
    and equal counts by the ids of the pair. Every text can be encoded, since all bytes are pieces.

    Args:
        vocabulary: number of pieces, with `<unk>`, `<pad>` and the 256 bytes. Few texts may give fewer.
        substitutions: patterns and what replaces them in a text before it is tokenized.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[UNKNOWN, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_substituted(text, substitutions) for text in texts), trainer)
    return _settings(tokenizer, substitutions)


def _settings(tokenizer: Any, substitutions: Sequence[tuple[str, str]]) -> dict[str, Any]:
    example = tokenizer.encode("a")
    inner = [i for i, special in enumerate(example.special_tokens_mask) if not special]
    return {
        "name": NAME,
        "substitutions": [list(rule) for rule in substitutions],
        "begin": example.ids[: inner[0]],
        "end": example.ids[inner[-1] + 1 :],
        "padding": _id_of(tokenizer, "[PAD]", PADDING),
        "unknown": _id_of(tokenizer, "[UNK]", UNKNOWN),
        "json": tokenizer.to_str(),
    }


def _substituted(text: str, substitutions: Iterable[Sequence[str]]) -> str:
    for pattern, replacement in substitutions:
        text = re.sub(pattern, replacement, text)
    return text


def _id_of(tokenizer: Any, *pieces: str) -> int:
    """The id of the first piece that the vocabulary has, or 0."""
    return next((id for piece in pieces if (id := tokenizer.token_to_id(piece)) is not None), 0)


def vocabulary(settings: Mapping[str, Any]) -> list[str]:
    """The pieces in the order of their ids."""
    pieces = load_tokenizer(settings["json"]).get_vocab()
    return sorted(pieces, key=pieces.__getitem__)


def encode(texts: Sequence[str], settings: Mapping[str, Any]) -> list[list[int]]:
    """The pieces of each text as ids, without the ids around them; on all cores. An empty text is an unknown piece."""
    texts = [_substituted(text, settings["substitutions"]) for text in texts]
    encodings = load_tokenizer(settings["json"]).encode_batch_fast(texts, add_special_tokens=False)
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
