"""Masks credentials in texts that are shown, logged or published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
PLACEHOLDER = "USER"  # stands in messages that show the form of an address
_USER_INFO = re.compile(r"(?<=://)(?:([^/@\s:?#]*):)?[^/\s?#]*(?=@)")  # greedy: a password may hold an @
_SECRET_PARAMETER = re.compile(
    r"(?i)(password=|[?&](?:pwd|token|access_token|api_?key|key|secret|sig|signature|x-amz-[a-z-]+)=)[^&;\s'\"]+"
)


def masked(text: str) -> str:
    """The text with `***` for the passwords and tokens of the addresses in it; user names and hosts stay.

    `https://user:password@host` becomes `https://user:***@host`, `https://token@host` becomes `https://***@host`, and
    the values of parameters such as `password`, `token` or `sig` are masked.
    """

    def user_info(match: re.Match[str]) -> str:
        if match[0] == PLACEHOLDER:
            return PLACEHOLDER
        return f"{match[1]}:{MASK}" if match[1] else MASK

    return _SECRET_PARAMETER.sub(rf"\g<1>{MASK}", _USER_INFO.sub(user_info, text))


def masked_values(value: Any) -> Any:
    """Nested mappings and lists with each text in them masked."""
    if isinstance(value, Mapping):
        return {key: masked_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked_values(item) for item in value]
    return masked(value) if isinstance(value, str) else value
