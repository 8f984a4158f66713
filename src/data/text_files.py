"""Decodes text files: UTF-8, what a byte-order mark says, or a named encoding. No torch."""

from __future__ import annotations

import codecs

from src.data.fetching.files import SourceError

_HEAD = 1 << 16  # bytes of a file that are searched for zeros
# UTF-32's mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def codec_of(content: bytes, encoding: str | None) -> str:
    """The codec that decodes a file to text without a byte-order mark."""
    marked = next((codec for mark, codec in _MARKS if content.startswith(mark)), None)
    is_utf8 = encoding is None or codecs.lookup(encoding).name == "utf-8"
    return (marked or "utf-8") if is_utf8 else str(encoding)


def undecodable(content: bytes, name: str, encoding: str | None) -> SourceError:
    """The refusal of a file that its codec can't decode; names the first byte that does not fit."""
    codec, at = codec_of(content, encoding), 0
    try:
        content.decode(codec)
    except UnicodeDecodeError as error:
        at = error.start
    remedy = "give its encoding, e.g. encoding: latin-1" if encoding is None else "give another encoding"
    label = codec.removesuffix("-sig").upper()
    return SourceError(f"{name} is not {label} (byte {at}: 0x{content[at]:02x}): {remedy}, or convert or remove it")


def refuse_zero_bytes(content: bytes, name: str, codec: str) -> None:
    """Refuses a file of zero bytes, which UTF-8 allows and no text has.

    Raises:
        SourceError: with the encoding that it may have.
    """
    if codec.startswith("utf-8") and b"\0" in content[:_HEAD]:
        raise SourceError(
            f"{name} holds zero bytes, the first at byte {content.index(0)}: if it is UTF-16 without a byte-order "
            "mark, give encoding: utf-16-le; else it is no text"
        )


def decode(content: bytes, name: str, encoding: str | None = None) -> str:
    """The text of a file.

    Raises:
        SourceError: it has another encoding.
    """
    codec = codec_of(content, encoding)
    refuse_zero_bytes(content, name, codec)
    try:
        return content.decode(codec)
    except UnicodeError:
        raise undecodable(content, name, encoding) from None
