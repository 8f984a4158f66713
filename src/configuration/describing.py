"""The part of `--help` on a configuration: each key with its value, description, type or range, and default."""

from __future__ import annotations

import json
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from omegaconf import DictConfig, OmegaConf
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from src.common.paths import CONF
from src.configuration.refusing import sections_in
from src.configuration.schema import Config, Section

WIDTH = 100  # columns
LONGEST_VALUE = 28  # characters; longer ones are cut
TYPES = {int: "int", float: "number", str: "text", bool: "true | false", types.NoneType: "null"}


def describe_keys(config: Config, comments: Mapping[str, str]) -> str:
    """A line for each key of a configuration; `comments` describe the keys whose schema has no description."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value, field, choices in keys_of(config):
        text = field.description or comments.get(key, "")
        allowed = " | ".join(choices) or _type(field.annotation, field.metadata)
        facts = "; ".join(fact for fact in (allowed, _default(field, value)) if fact)
        shown = f"{text} ({facts})" if text and facts else text or facts
        groups.setdefault(key.rpartition(".")[0], []).append((f"{key}={_short(value)}", shown))
    return "\n".join(line for rows in groups.values() for line in _aligned(rows))


def conf_comments(choices: Mapping[str, str]) -> dict[str, str]:
    """The comments beside the keys of conf/, by dotted key; `choices`: the chosen file of each group."""
    comments: dict[str, str] = {}
    for group, choice in choices.items():
        path = CONF / group / f"{choice}.yaml"
        text = path.read_text() if path.is_file() else ""
        if base := re.search(r"^defaults: \[(\w+)\]", text, re.MULTILINE):
            comments |= conf_comments({group: base[1]})
        parents: list[tuple[int, str]] = [(-1, group)]
        for line in text.splitlines():
            if match := re.match(r"^( *)(\w+):.*?(?:  # (.*))?$", line):
                indent = len(match[1])
                parents = [parent for parent in parents if parent[0] < indent] + [(indent, match[2])]
                if match[3]:
                    comments[".".join(name for _, name in parents)] = match[3].strip()
    return comments


def describe_composed(root: DictConfig, check: Callable[[Any], Config]) -> str:
    """The keys of what Hydra composed for `--help`, or why it is refused."""
    from src.common.errors import ConfigError

    content = OmegaConf.create({key: value for key, value in root.items_ex(resolve=False) if key != "hydra"})
    if OmegaConf.is_interpolation(content, "output"):  # Hydra knows the folder of a run only when it runs
        content.output = "experiments/runs/NAME/TIME"
    try:
        text = describe_keys(check(content), conf_comments(root.hydra.runtime.choices))
    except ConfigError as error:
        text = "\n".join(f"configuration refused: {line}" for line in str(error).splitlines())
    return text.replace("$", "$$")  # Hydra substitutes names after a $


def keys_of(
    section: Section, prefix: str = "", names: Sequence[str] = ()
) -> Iterator[tuple[str, Any, FieldInfo, Sequence[str]]]:
    """Each key below a section: dotted key, value, field, and the choices beyond its type.

    `names`: those by which the section may be exchanged for another, as an optimizer may.
    """
    for name, field in type(section).model_fields.items():
        key, value = prefix + (field.alias or name), getattr(section, name)
        if isinstance(value, Section):
            alternatives = sections_in(field.annotation)
            tags = [get_args(s.model_fields["name"].annotation)[0] for s in alternatives] if alternatives[1:] else []
            yield from keys_of(value, f"{key}.", tags)
        else:
            yield key, value, field, names if name == "name" else ()


def _type(annotation: Any, metadata: Sequence[Any]) -> str:
    """A type and its range in words, such as `int > 0` or `sgd | adam`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"{{{', '.join(annotation.model_fields)}}}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(argument, ()) for argument in arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"list of {_type(arguments[0], ())}"
    if origin is dict:
        return "mapping"
    return TYPES.get(annotation, "") + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    """The bounds in a type's metadata, such as ` >= 0, <= 1`."""
    flat = [item for part in metadata for item in (part.metadata if isinstance(part, FieldInfo) else [part])]
    words = {bounds.Gt: "> {.gt}", bounds.Ge: ">= {.ge}", bounds.Lt: "< {.lt}", bounds.Le: "<= {.le}"}
    parts = [words[type(item)].format(item) for item in flat if type(item) in words]
    return f" {', '.join(parts)}" if parts else ""


def _default(field: FieldInfo, value: Any) -> str:
    """The default, where the value is another."""
    if field.default is PydanticUndefined or field.default in (value, ""):
        return ""
    return f"default {_short(field.default)}"


def _short(value: Any) -> str:
    """A value as it is typed on the command line, cut to `LONGEST_VALUE` characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _aligned(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Two columns, the second one wrapped, then an empty line."""
    width = max(len(left) for left, _ in rows) + 2
    for left, right in rows:
        first, *more = textwrap.wrap(right, WIDTH - width - 2) or [""]
        yield f"  {left:{width}}{first}".rstrip()
        yield from (" " * (width + 2) + line for line in more)
    yield ""
