"""Refusals: one line per fault, with the key's path, the value, what is allowed and the nearest name."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import Any, get_args

from src.common.credentials import masked
from src.common.paths import CONF
from src.configuration.schema import Section


def refusal(lines: str) -> int:
    """Prints the faults, one a line; returns the exit code."""
    for line in lines.splitlines():
        print(f"configuration refused: {masked(line)}", file=sys.stderr)
    return 2


def explain_hydra(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf, with the nearest name."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if options := getattr(error, "options", None):  # a group's choice that is not there
        missing = str(getattr(error, "missing_cfg_file", ""))
        group, _, choice = missing.rpartition("/")
        return f"{group}={choice}: unknown; allowed: {listed(options)}{nearest(choice, options)}"
    if "You must specify" in text:
        return f"experiment: not given; say which: {', '.join('+experiment=' + name for name in experiments())}"
    return text


def experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def explain_fault(fault: Any, content: Any, schema: type[Section]) -> str:
    """One line for one of pydantic's faults."""
    keys: list[str] = []
    section: Any = content
    # A union puts its tag or its branch into the path: keep the parts that are keys of the content.
    for position, part in enumerate(map(str, fault["loc"]), start=1):
        if isinstance(section, Mapping) and part in section:
            section = section[part]
        elif isinstance(section, list) and part.isdigit() and int(part) < len(section):
            section = section[int(part)]
        elif fault["type"] != "missing" or position < len(fault["loc"]):
            continue
        keys.append(part)
    path, value, context = ".".join(keys) or "configuration", fault["input"], fault.get("ctx", {})
    match fault["type"]:
        case "extra_forbidden":
            allowed = _allowed_keys(schema, keys[:-1], content)
            return f"{path}: unknown key; allowed: {listed(allowed)}{nearest(keys[-1], allowed)}"
        case "missing":
            return f"{path}: not given"
        case "union_tag_invalid":
            names = [name.strip(" '") for name in context["expected_tags"].split(",")]
            if not context["tag"]:
                return f"{path}: {value!r} has no name; allowed: {{name: X, ...}}, X one of {listed(names)}"
            return (
                f"{path}.name: {context['tag']!r} is unknown; allowed: {listed(names)}{nearest(context['tag'], names)}"
            )
        case "literal_error":
            names = [name.strip(" '") for name in context["expected"].replace(" or ", ", ").split(",")]
            return f"{path}: {value!r} is unknown; allowed: {listed(names)}{nearest(str(value), names)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{path}: {value!r} is not allowed: {message[0].lower()}{message[1:]}"


def _allowed_keys(schema: type[Section], path: list[str], content: Any) -> list[str]:
    """The keys that the schema allows at `path`."""
    for key in path:
        content = content[key]
        if key not in schema.model_fields:  # a key of a mapping of sections, whose field led to their schema
            continue
        sections = sections_in(schema.model_fields[key].annotation)
        schema = next(
            s
            for s in sections
            if len(sections) == 1 or get_args(s.model_fields["name"].annotation) == (content["name"],)
        )
    return [field.alias or key for key, field in schema.model_fields.items()]


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections in an annotation, such as the alternatives of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in sections_in(part)]


def listed(names: Any) -> str:
    return ", ".join(sorted(str(name) for name in names))


def nearest(name: str, names: Any) -> str:
    matches = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f". Did you mean {matches[0]!r}?" if matches else ""
