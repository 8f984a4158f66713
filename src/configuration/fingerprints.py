"""Code fingerprints: the one answer to "what does this result depend on".

A stage's fingerprint covers the code that the stage executes and the locked versions of the packages that this code
imports. `compose` writes it where DVC watches it, a checkpoint is resumed only under the same one, and every run
records it.

The code is the import closure of the stage's module and of what the configuration names (`_target_`s, the task, the
kind of data), imports inside functions included. Each module counts through its normalised syntax tree: comments,
docstrings, formatting, type annotations of functions, error messages and printing are gone. Packages count because
another torch or numpy may give other bits; their versions come from requirements.lock, so that a commit has the same
fingerprints on every machine. What is imported by neutral modules alone (MLflow, Hydra) never counts.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.common.credentials import masked
from src.common.files import sha256_of
from src.common.identity import fingerprint
from src.common.paths import ROOT, input_path
from src.configuration.declarations import monitor_direction
from src.configuration.schema import Config, DataConfig, Pretrained, plain
from src.configuration.targets import attribute_of, targets_in

LOCK = "requirements.lock"

# Code that cannot change what a stage computes, and why. A package stands for all modules in it.
NEUTRAL = {
    "src.tracking": "records a run; nothing flows back into it",
    "src.configuration": "its results are in the resolved configuration, which DVC watches key by key",
    "src.common.console": "prints",
    "src.common.credentials": "masks texts that are printed",
    "src.common.dvc_stage": "ends with DVC and restores the last outputs of a failed stage",
    "src.common.errors": "messages",
    "src.common.files": "writes the bytes that it gets; a wrong digest is an error, not another result",
    "src.common.git": "describes the repository",
    "src.common.identity": "names what a run depends on",
    "src.common.garbage": "pauses the garbage collector during imports",
    "src.common.ordered": "when a task runs changes no result",
    "src.common.ray_cluster": "where something is computed changes no result",
    "src.common.paths": "where the repository lies",
    "src.common.run_folder": "names of files; DVC watches the same paths",
    "src.common.signals": "ends a run in good order; a resumed run has the same bits",
    "src.data.preparing": "finds or makes the data of a direct run, whose sha256 counts",
    "src.training.progress": "pictures during training, which DVC does not hash",
}
NEUTRAL |= dict.fromkeys(
    ("filelock", "psutil", "pydantic", "pyyaml", "requests", "rich"), "a package that computes no number"
)
# The same for one stage only.
NEUTRAL_IN = {
    "preprocess": {
        "src.common.hardware": "the number of processes that tokenize changes no token",
        "src.data.rows_on_ray": "an image is decoded alike on all machines",
    },
    "describe": {
        "src.common.hardware": "the number of threads that measure images changes no figure",
        "src.common.pictures": "of reporting.plots, whose colours alone the page has",
        "matplotlib": "the same",
    },
    "train": {
        "src.data.fetching": "what it brings counts by its sha256",
        "src.tasks": "evaluation; `stage_code` adds the direction of the monitored metric",
        "src.reporting.plots": "train writes no picture that DVC hashes",
        "onnxscript": "a model's operators for ONNX are export's",
    },
    "export": {
        "src.exporting.latency": "latencies are not hashed by DVC",
        "src.reporting.plots": "nor is their picture",
    },
}
DATA_STAGES = ("preprocess", "describe")  # of a data set, whatever its model
# Distributions whose import name is another one.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


@dataclass(frozen=True)
class Code:
    """What a stage executes: each module's digest (by its path in the repository) and each package's version.

    For `train` also the direction of the monitored metric, which its task declares.
    """

    modules: Mapping[str, str]
    packages: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """16 hex digits."""
        return fingerprint([dict(self.modules), dict(self.packages)])


def stage_code(stage: str, config: DataConfig, root: Path = ROOT) -> Code:
    """The code of `train`, `evaluate` or `export` under a `Config`, of `DATA_STAGES` under a `DataConfig`."""
    entries = [f"src.{stage}", *(target.rpartition(".")[0] for target in _targets(stage, config))]
    if stage == "describe":
        kind = attribute_of(config.data.target, "kind")
        has_own = (root / "src" / "describing" / "kinds" / f"{kind}.py").is_file()
        entries.append(f"src.describing.kinds.{kind if has_own else 'plain'}")
    if isinstance(config, Config) and stage not in DATA_STAGES:
        entries.append(f"src.tasks.{attribute_of(config.model.target, 'task')}")
        entries.append(f"src.data.kinds.{attribute_of(config.data.target, 'kind')}")
    code = closure(entries, frozenset(NEUTRAL) | frozenset(NEUTRAL_IN.get(stage, ())), root)
    if stage == "train" and isinstance(config, Config):  # keep=best and early stopping compare by it
        return replace(code, modules={**code.modules, config.trainer.monitor: monitor_direction(config)})
    return code


def archive_fingerprint(config: DataConfig, root: Path = ROOT) -> str:
    """What the raw archive depends on: its sha256; else where it comes from; of a sample the code that draws it.

    So an archive is fetched again only if another one is wanted, whatever else changes. A file of the user's counts by
    its content, which is read here unless `data.sha256` is given. With the archive comes an encoder's tokenizer.
    """
    archive = _archive_fingerprint(config, root)
    tokenizer = getattr(config.data, "tokenizer", None)
    return fingerprint([archive, _described(tokenizer)]) if isinstance(tokenizer, Pretrained) else archive


def _archive_fingerprint(config: DataConfig, root: Path) -> str:
    data = config.data
    if config.profile.name == "sample":
        drawn_by = attribute_of(data.target, "sample")
        return closure([drawn_by], frozenset(NEUTRAL), root).fingerprint if drawn_by else "none"
    if data.archive:
        return fingerprint([data.sha256] if data.sha256 else _contents(data.archive))
    if data.official is None:
        return "none"
    official = data.official
    return fingerprint([official.sha256] if official.sha256 else [official.files or official.urls])


def weights_fingerprint(config: Config) -> str:
    """What the weights that a training begins with depend on; `none` where it begins with random ones.

    A file or a folder of the user's counts by its content.
    """
    pretrained = [_described(config.pretrained)] if config.pretrained else []
    earlier = [_earlier_run(config.init_from)] if config.init_from else []
    return fingerprint([pretrained, earlier]) if pretrained or earlier else "none"


def _described(pretrained: Pretrained) -> list[Any]:
    """What identifies a pretrained network: its names and pins, and the content of what is a path."""
    paths = [value for value in (pretrained.name, pretrained.weights) if input_path(value).exists()]
    return [plain(pretrained), [_contents(path) for path in paths]]


def _earlier_run(name: str) -> list[str]:
    """What identifies an earlier run: the sha256 of its model.json, or its id."""
    notes = [input_path(name) / "train" / "model.json", input_path(name) / "model.json"]
    return next(([sha256_of(note)] for note in notes if note.is_file()), [name])


def _contents(archive: str) -> list[Any]:
    """What identifies the user's archive: a file's sha256; a folder's names, sizes and times; an address itself."""
    path = input_path(archive)
    if path.is_file():
        return [sha256_of(path)]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return [[file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return ["archive", masked(archive)]  # a recorded configuration holds no more; another token is the same archive


def closure(entries: Iterable[str], neutral: frozenset[str], root: Path = ROOT) -> Code:
    """The code of the modules `entries` and of all modules of src/ that they import, at any depth.

    Modules under `neutral` are left out, and what they import does not count.
    """
    modules: dict[str, str] = {}
    packages: set[str] = set()
    pending = list(entries)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen or any(f"{name}.".startswith(f"{prefix}.") for prefix in neutral):
            continue
        seen.add(name)
        path = _file_of(name, root)
        if path is None:
            continue
        parent = name.rpartition(".")[0]
        module = _read(path, path.stat().st_mtime_ns)
        if module.digest:
            modules[path.relative_to(root).as_posix()] = module.digest
        packages |= module.packages
        pending += [*module.imports, *([parent] if parent else [])]
    locked = _locked_versions(root / LOCK, (root / LOCK).stat().st_mtime_ns)
    versions = {name: locked[name] for name in sorted(packages - neutral) if name in locked}
    return Code(dict(sorted(modules.items())), versions)


def _targets(stage: str, config: DataConfig) -> Iterator[str]:
    """The `_target_`s in the sections of the configuration that a stage builds."""
    sections: list[Any] = [config.data] if stage == "preprocess" else []
    if isinstance(config, Config) and stage not in DATA_STAGES:
        sections = [config.model, config.trainer]
    for section in sections:
        yield from (target for _, target in targets_in(plain(section)))


def _file_of(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@dataclass(frozen=True)
class _Module:
    digest: str  # '' where nothing is executed
    imports: tuple[str, ...]  # modules of src/, and names that may be modules
    packages: frozenset[str]  # distributions


@functools.cache
def _read(path: Path, changed: int) -> _Module:
    """A module's digest and imports; `changed`, its time of change, makes the cache heed edits."""
    tree = _Normaliser().visit(ast.parse(path.read_bytes()))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name for name in names if name.partition(".")[0] == "src"}
    foreign = {name.partition(".")[0] for name in names - own} - sys.stdlib_module_names
    digest = hashlib.sha256(repr(_canonical(tree)).encode()).hexdigest()[:16] if tree.body else ""
    return _Module(digest, tuple(sorted(own)), frozenset(DISTRIBUTIONS.get(n, n.replace("_", "-")) for n in foreign))


def _canonical(node: Any) -> Any:
    """A syntax tree as nested tuples without empty fields, so that each version of Python gives the same."""
    if isinstance(node, ast.AST):
        fields = ((name, _canonical(value)) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind"))
        return (type(node).__name__, *((name, value) for name, value in fields if value not in (None, ())))
    if isinstance(node, list):
        return tuple(_canonical(item) for item in node)
    return repr(node) if node is not None else None


class _Normaliser(ast.NodeTransformer):
    """Removes what no result depends on; comments and formatting are not in the tree to begin with."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Drops docstrings (any text that stands alone) and statements that only print or log."""
        call = node.value
        is_text = isinstance(call, ast.Constant) and isinstance(call.value, str)
        return None if is_text or _is_message(call) else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Drops the arguments of an exception: its message."""
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Drops imports for type checking."""
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return [statement for part in node.orelse if (statement := self.visit(part))]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def _is_message(call: ast.expr) -> bool:
    if not isinstance(call, ast.Call):
        return False
    function = call.func
    if isinstance(function, ast.Name):
        return function.id == "print"
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    return owner in ("log", "logging", "console", "warnings")


@functools.cache
def _locked_versions(lock: Path, changed: int) -> dict[str, str]:
    """Distribution -> version, as the lock pins them."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", lock.read_text(), re.MULTILINE))
