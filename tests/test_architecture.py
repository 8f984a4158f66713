"""The rooms of src/ against the table in docs/architecture.md: who imports whom, and that no circle is among them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.common.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| ([\w, ]*)\|$", PAGE.partition("| room | may use |")[2], re.MULTILINE)
ALLOWED = {room: {name.strip() for name in names.split(",") if name.strip()} for room, names in ROWS}
FILES = sorted(path for folder in ("src", "verification", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "src" else parts[1] if len(parts) > 2 else "commands"


def imports(path: Path) -> Iterator[Path]:
    """The files of this repository that a file imports, wherever in its code, for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            if name.partition(".")[0] in ("src", "verification", "benchmarks"):
                stem = ROOT.joinpath(*name.split("."))
                yield from (file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file())


def test_the_table_has_a_row_for_each_room() -> None:
    rooms = {path.name for path in (ROOT / "src").iterdir() if (path / "__init__.py").is_file()}
    assert ALLOWED.keys() == rooms | {"commands", "verification", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_a_room_uses_only_what_its_row_allows(path: Path) -> None:
    room = room_of(path)
    used = {room_of(file) for file in imports(path) if file != ROOT / "src" / "__init__.py"}
    assert used - {room} <= ALLOWED[room]


def test_no_file_imports_itself_through_others() -> None:
    graph = {path: {file for file in imports(path) if file.name != "__init__.py"} for path in FILES}
    order: list[Path] = []
    active: list[Path] = []

    def visit(path: Path) -> None:
        assert path not in active, " -> ".join(f.stem for f in [*active[active.index(path) :], path])
        if path not in order:
            active.append(path)
            for file in sorted(graph[path]):
                visit(file)
            active.pop()
            order.append(path)

    for path in FILES:
        visit(path)


def test_data_and_models_know_nothing_of_dvc_and_mlflow() -> None:
    for path in FILES:
        if room_of(path) in ("data", "models"):
            modules = {n.names[0].name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import)}
            assert not modules & {"mlflow", "dvc"}, path
            assert "mlflow" not in path.read_text().lower(), path


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_outputs_are_replaced_and_never_written_through_a_link(path: Path) -> None:
    """DVC may keep its cache as links: a file that is written in place would change there."""
    in_place = re.findall(r"\.write_(?:text|bytes)\(|(?<!tarfile\.)open\([^)\n]*[\"'][wax]b?\+?[\"']", path.read_text())
    # The replacing itself, a download's partial file, a worker's log: none of them is an output of DVC's.
    exceptions = {"src/common/files.py", "src/data/fetching/download.py", "src/sweeping/worker.py"}
    assert not in_place or path.relative_to(ROOT).as_posix() in exceptions
