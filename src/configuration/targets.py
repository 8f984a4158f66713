"""Which classes a configuration may name by `_target_`, and what they declare: read from their source.

The source is parsed, not imported: importing a model means importing torch and Lightning, 4 s that a mistyped key
should not cost.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Source:
    """The top level of a module: classes and functions, assignments, and imports from this repository."""

    module: str
    definitions: Mapping[str, Definition]
    assignments: Mapping[str, ast.expr]
    imports: Mapping[str, str]  # local name -> full dotted name


@functools.cache
def read_source(module: str) -> Source:
    """Parses a module of this repository.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = ROOT.joinpath(*module.split("."))
    body = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src.")]
    return Source(
        module,
        {node.name: node for node in body if isinstance(node, Definition)},
        {
            node.targets[0].id: node.value
            for node in body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        },
        {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names},
    )


def definition_of(target: str) -> tuple[Source, Definition]:
    """The class or function that a `_target_` names, with its module.

    Raises:
        ValueError: the target is outside the allowed rooms, or does not exist.
    """
    module, _, attribute = target.rpartition(".")
    if not (target.startswith(TARGET_ROOMS) and all(part.isidentifier() for part in target.split("."))):
        raise ValueError(f"is not allowed: only {' and '.join(room + '*' for room in TARGET_ROOMS)} are instantiated")
    try:
        source = read_source(module)
    except FileNotFoundError:
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        modules = [f"{module.rpartition('.')[0]}.{other.stem}" for other in sorted(path.parent.glob("[a-z]*.py"))]
        raise ValueError(f"is not there: no file {path.relative_to(ROOT)}{nearest(module, modules)}") from None
    public = [name for name in source.definitions if not name.startswith("_")]
    if attribute not in public:
        raise ValueError(
            f"is not there: {module.replace('.', '/')}.py has {listed(public)}{nearest(attribute, public)}"
        )
    return source, source.definitions[attribute]


def lineage(source: Source, node: Definition) -> Iterator[tuple[Source, Definition]]:
    """A class and its base classes in this repository, the class first; a function alone."""
    yield source, node
    for base in getattr(node, "bases", []):
        name = base.id if isinstance(base, ast.Name) else ""
        if isinstance(parent := source.definitions.get(name), ast.ClassDef):
            yield from lineage(source, parent)
        elif name in source.imports:
            module, _, attribute = source.imports[name].rpartition(".")
            other = read_source(module)
            if attribute in other.definitions:
                yield from lineage(other, other.definitions[attribute])


def attribute_of(target: str, attribute: str) -> Any:
    """A class attribute of a target, inherited ones included; None where it is not assigned a literal.

    Raises:
        ValueError: the target is outside the allowed rooms, or does not exist.
    """
    for _, node in lineage(*definition_of(target)):
        for line in node.body:
            if not isinstance(line, ast.Assign | ast.AnnAssign) or line.value is None:
                continue
            names = line.targets if isinstance(line, ast.Assign) else [line.target]
            if isinstance(node, ast.ClassDef) and any(ast.unparse(name) == attribute for name in names):
                return ast.literal_eval(line.value)
    return None


def _assigned(source: Source, name: str) -> tuple[Source, ast.expr] | None:
    """What a module's constant is assigned, in the module itself or in the one that it imports it from."""
    if name in source.assignments:
        return source, source.assignments[name]
    if name in source.imports:
        module, _, attribute = source.imports[name].rpartition(".")
        return _assigned(read_source(module), attribute)
    return None


def _annotation(source: Source, expression: ast.expr) -> Any:
    """The type that an annotation stands for: an expression over the schema's vocabulary and the module's aliases."""
    names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)} - vars(schema).keys()
    aliases = {name: _annotation(*alias) for name in sorted(names) if (alias := _assigned(source, name))}
    return eval(ast.unparse(expression), vars(schema) | aliases)


def _default(source: Source, expression: ast.expr | None) -> Any:
    """A parameter's default: a literal, or a module's constant."""
    if expression is None:
        return ...
    if isinstance(expression, ast.Name) and (constant := _assigned(source, expression.id)):
        return _default(*constant)
    return ast.literal_eval(expression)


@functools.cache
def parameters_of(target: str) -> dict[str, tuple[Any, Any]]:
    """The keyword-only parameters of a target as name -> (annotation, default); a class may inherit its constructor.

    Raises:
        ValueError: the target is outside the allowed rooms, does not exist, or has a parameter that no configuration
            can set.
    """
    for source, node in lineage(*definition_of(target)):
        if isinstance(node, ast.ClassDef):
            node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), node)
        if not isinstance(node, ast.FunctionDef):
            continue
        fields: dict[str, Any] = {}
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            try:
                annotation = _annotation(source, argument.annotation or ast.Name("missing"))
                fields[argument.arg] = (annotation, _default(source, default))
            except (NameError, ValueError):  # a type or default outside the vocabulary
                raise ValueError(f"is nothing to configure: no configuration can give its {argument.arg!r}") from None
        return fields
    return {}


def schema_of(base: type[Build], content: Any, path: str) -> type[Build]:
    """`base` with the parameters of the target that `content` names, and so on for the sections in it."""
    target = target_in(content, path)
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


def target_in(content: Any, path: str) -> str:
    """The `_target_` of a section.

    Raises:
        ConfigError: it has none.
    """
    target = content.get("_target_") if isinstance(content, Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_: not given")
    return target
