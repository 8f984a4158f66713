"""Optimizers and schedules named by `_target_`: their keys, read from the source of torch.optim.

torch is located but not imported: its import takes seconds, and a mistyped key is refused in half a second.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from src.configuration.refusing import listed, nearest
from src.configuration.schema import STEPS, Positive

OPTIMIZERS, SCHEDULES = "torch.optim.", "torch.optim.lr_scheduler."
# A schedule is stepped after every batch and gets no metric; `Optimizer` and `LRScheduler` are base classes.
_EXCLUDED = ("Optimizer", "LRScheduler", "ReduceLROnPlateau")
# The annotations of torch 2.12.1, as types of values in a configuration.
_TYPES = {"Tensor": float, "Iterable": list, "Literal": Literal}


def torch_parameters(target: str, prefix: str) -> dict[str, tuple[Any, Any]]:
    """The keys of a class of torch.optim: name -> (annotation, default or `...`).

    `prefix` is OPTIMIZERS or SCHEDULES. Keys whose values no configuration can hold (functions) are left out.

    Raises:
        ValueError: the class does not exist, or needs an argument that no configuration can hold.
    """
    name = target.removeprefix(prefix)
    classes = _classes(prefix)
    if name not in classes:
        raise ValueError(f"does not exist: {prefix.rstrip('.')} has {listed(classes)}{nearest(name, classes)}")
    constructor = next(n for n in classes[name].body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    positional = constructor.args.args[1:]
    defaults = [None] * (len(positional) - len(constructor.args.defaults)) + list(constructor.args.defaults)
    pairs = [*zip(positional, defaults, strict=True)]
    pairs += zip(constructor.args.kwonlyargs, constructor.args.kw_defaults, strict=True)
    parameters: dict[str, tuple[Any, Any]] = {}
    for argument, default in pairs:
        if argument.arg in ("params", "optimizer", "last_epoch"):  # the caller's, and Lightning's when it resumes
            continue
        try:
            value = ... if default is None else eval(ast.unparse(default), {"__builtins__": {}})
            parameters[argument.arg] = (_annotation(argument, prefix), value)
        except NameError:  # a type or a constant that is not in `_TYPES`
            if default is None:
                raise ValueError(f"is not configurable: no configuration can hold its {argument.arg!r}") from None
    return parameters


def _annotation(argument: ast.arg, prefix: str) -> Any:
    if argument.arg == "lr":
        return Positive
    source = ast.unparse(argument.annotation) if argument.annotation else "object"
    annotation = eval(source, dict(_TYPES))
    if prefix == SCHEDULES and source in ("int", "int | None"):
        return annotation | Literal[STEPS]
    if source.startswith("tuple["):  # YAML has lists only
        return Annotated[annotation, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
    return annotation


@functools.cache
def _classes(prefix: str) -> dict[str, ast.ClassDef]:
    """The public classes of torch.optim or torch.optim.lr_scheduler, by name."""
    spec = importlib.util.find_spec("torch")  # a top-level package is located without being executed
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "optim"
    if prefix == SCHEDULES:
        files = [folder / "lr_scheduler.py"]
    else:
        imports = [n for n in ast.parse((folder / "__init__.py").read_text()).body if isinstance(n, ast.ImportFrom)]
        modules = [str(n.module).rpartition(".")[2] for n in imports if str(n.module).startswith(OPTIMIZERS)]
        files = [folder / f"{module}.py" for module in modules]
    classes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    return {node.name: node for node in classes if not node.name.startswith("_") and node.name not in _EXCLUDED}
