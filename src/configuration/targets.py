"""Which classes a configuration may name by `_target_`, and which keys they take: read from their source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from src.common.errors import ConfigError
from src.common.paths import ROOT
from src.configuration import schema
from src.configuration.optimizers import OPTIMIZERS, SCHEDULES, torch_parameters
from src.configuration.refusing import listed, nearest
from src.configuration.schema import Build

# Where a `_target_` may point: code execution is allowed in these rooms of this repository and nowhere else.
TARGET_ROOMS = ("src.data.", "src.models.")


@functools.cache
def parameters_of(target: str) -> dict[str, tuple[Any, Any]]:
    """What `target` can be given: its keyword-only parameters as name -> (annotation, default), read from its source.

    The source is parsed, not imported: importing a model means importing torch and Lightning, 4 s that a mistyped key
    should not cost. A parameter's annotation is an expression over this module's vocabulary.

    Raises:
        ValueError: the target is outside the allowed rooms, or is not there.
    """
    module, _, attribute = target.rpartition(".")
    if not (target.startswith(TARGET_ROOMS) and all(part.isidentifier() for part in target.split("."))):
        raise ValueError(f"is not allowed: only {' and '.join(room + '*' for room in TARGET_ROOMS)} are instantiated")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not source.is_file():
        modules = [f"{module.rpartition('.')[0]}.{path.stem}" for path in sorted(source.parent.glob("[a-z]*.py"))]
        raise ValueError(f"is not there: no file {source.relative_to(ROOT)}{nearest(module, modules)}")
    definitions = {
        node.name: node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    }
    if attribute not in definitions:
        raise ValueError(
            f"is not there: {source.relative_to(ROOT)} has {listed(definitions)}{nearest(attribute, definitions)}"
        )
    node: ast.AST | None = definitions[attribute]
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    fields: dict[str, Any] = {}
    if isinstance(node, ast.FunctionDef):
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            try:
                annotation = eval(ast.unparse(argument.annotation), vars(schema))  # type: ignore[arg-type]
                fields[argument.arg] = (annotation, ... if default is None else ast.literal_eval(default))
            except (NameError, ValueError):  # a type or default outside the vocabulary
                raise ValueError(f"is nothing to configure: no configuration can give its {argument.arg!r}") from None
    return fields


def schema_of(base: type[Build], content: Any, path: str) -> type[Build]:
    """`base` with the parameters of the target that `content` names, and so on for the sections in it."""
    target = content.get("_target_") if isinstance(content, Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_: not given")
    try:
        parameters = parameters_of(target)
    except ValueError as error:
        raise ConfigError(f"{path}._target_: {target!r} {error}") from None
    fields: dict[str, Any] = {
        key: (_section_type(annotation, content.get(key), f"{path}.{key}"), default)
        for key, (annotation, default) in parameters.items()
    }
    return pydantic.create_model(target.rpartition(".")[2], __base__=base, **fields)


def _section_type(annotation: Any, content: Any, path: str) -> Any:
    """The type of one key: its annotation, or the schema of the `_target_` that its content names."""
    if annotation is Build:
        return schema_of(Build, content, path)
    is_open = annotation in (schema.Optimizer, schema.Schedule) and isinstance(content, Mapping)
    if not (is_open and "_target_" in content):
        return annotation
    target = str(content["_target_"])
    prefix = OPTIMIZERS if annotation == schema.Optimizer else SCHEDULES
    if not target.startswith((prefix, "src.models.")):
        allowed = f"only {prefix}* and src.models.* are instantiated"
        raise ConfigError(f"{path}._target_: {target!r} is not allowed: {allowed}")
    if target.startswith("src.models."):
        return schema_of(Build, content, path)
    try:
        parameters: dict[str, Any] = dict(torch_parameters(target, prefix))
    except ValueError as error:
        raise ConfigError(f"{path}._target_: {target!r} {error}") from None
    return pydantic.create_model(target.rpartition(".")[2], __base__=Build, **parameters)


def targets_in(section: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every `_target_` in a section: (dotted path, target)."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            below = f"{path}.{key}".lstrip(".")
            yield from [(below, str(value))] if key == "_target_" else targets_in(value, below)
    elif isinstance(section, list):
        for index, value in enumerate(section):
            yield from targets_in(value, f"{path}.{index}")


@functools.cache
def attribute_of(target: str, name: str) -> str | None:
    """A class attribute of a `_target_` that is a text, such as a model's `task`, read from the source.

    Base classes in this repository count as well; None where no class sets it.
    """
    module, _, attribute = target.rpartition(".")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("src.")
        for alias in node.names
    }
    definition = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == attribute), None)
    if definition is None:
        return None
    for node in definition.body:
        names = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        if any(isinstance(n, ast.Name) and n.id == name for n in names) and isinstance(value, ast.Constant):
            return None if value.value is None else str(value.value)
    for base in definition.bases:
        if isinstance(base, ast.Name):
            inherited = attribute_of(imported.get(base.id, f"{module}.{base.id}"), name)
            if inherited is not None:
                return inherited
    return None
