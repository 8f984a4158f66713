"""Checks the callbacks that a configuration names against their source, without importing Lightning (4 s)."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.paths import ROOT

LIGHTNING = "pytorch_lightning.callbacks"
ALLOWED = (f"{LIGHTNING}.", "src.")


def check_callback(target: str, arguments: Mapping[str, Any]) -> None:
    """Checks that `target` may be instantiated, that it is there, and that its constructor takes the arguments.

    Raises:
        ValueError: with what is allowed.
    """
    if not (target.startswith(ALLOWED) and all(part.isidentifier() for part in target.split("."))):
        raise ValueError(f"_target_: only {' and '.join(f'{prefix}*' for prefix in ALLOWED)} are instantiated")
    module, _, name = target.rpartition(".")
    classes = _classes(module)
    if name not in classes:
        raise ValueError(f"_target_: {module} has no class {name}; it has {', '.join(sorted(classes)) or 'none'}")
    init = next((n for n in classes[name].body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None or init.args.kwarg:
        return  # inherited, or open
    names = [argument.arg for argument in (*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs)][1:]
    if unknown := sorted(arguments.keys() - set(names)):
        raise ValueError(f"unknown argument {', '.join(unknown)}; {name} takes {', '.join(sorted(names))}")
    positional = [*init.args.posonlyargs, *init.args.args][1:]
    required = [argument.arg for argument in positional[: len(positional) - len(init.args.defaults)]]
    required += [a.arg for a, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True) if not default]
    if missing := [argument for argument in required if argument not in arguments]:
        raise ValueError(f"missing argument {', '.join(missing)} of {name}")


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The public classes of a module; of Lightning's package of callbacks those that it exports."""
    path = _source(module)
    if path is None:
        return {}
    tree = ast.parse(path.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"}
    if module == LIGHTNING:
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(LIGHTNING):
                classes |= {k: v for k, v in _classes(node.module).items() if k in {n.name for n in node.names}}
    return classes


def _source(module: str) -> Path | None:
    """A module's file, located without importing it."""
    top, *parts = module.split(".")
    root = ROOT / "src"
    if top != "src":
        spec = importlib.util.find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            return None
        root = Path(spec.submodule_search_locations[0])
    path = root.joinpath(*parts)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)
