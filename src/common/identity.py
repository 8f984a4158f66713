"""What makes a run or a study the one that it is: everything that its results depend on, by name, as plain strings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


def described(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested values as JSON, each under its keys joined by dots."""
    return {key: json.dumps(value, sort_keys=True) for key, value in flattened(values)}


def fingerprint(identity: Any) -> str:
    """16 hex digits for an identity, or for anything else that JSON can write."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def data_digest(meta: Mapping[str, Any]) -> str:
    """What identifies packed splits, by their meta.json: a digest of their sha256, 16 hex digits."""
    return fingerprint({split: facts["sha256"] for split, facts in meta["splits"].items()})


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs between two identities, one phrase each; of files and digests the names alone."""
    phrases = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key, "not there"), new.get(key, "not there")
        if before != now:
            is_digest = key.endswith((".py", ".lock", ".sha256"))
            phrases.append(key if is_digest else f"{key} was {before}, is {now}")
    return phrases


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, each value with its keys joined by dots; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
