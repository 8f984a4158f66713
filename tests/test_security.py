"""The code does not unpickle, load YAML with constructors, use a shell, or listen to other machines."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, commands_environment

SOURCES = sorted((ROOT / "src").rglob("*.py"))
UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dotted_name(node: ast.AST) -> str:
    """The source of a dotted name; empty for any other expression."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def unsafe(tree: ast.AST) -> Iterator[str]:
    """The constructs in a module that can run code from data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNPICKLING)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLING:
            yield f"imports {node.module}"
        elif isinstance(node, ast.Call):
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            match dotted_name(node.func):
                case "torch.load" if options.get("weights_only") != "True":
                    yield "torch.load without weights_only=True"
                case "np.load" | "numpy.load" if options.get("allow_pickle", "False") != "False":
                    yield "numpy.load with allow_pickle"
                case "yaml.load" | "yaml.load_all" | "yaml.unsafe_load" | "yaml.full_load" | "yaml.safe_load":
                    yield "a YAML reader other than read_yaml"
                case "YAML" if options.get("typ") != "'safe'":
                    yield "a YAML reader that constructs more than plain values"
            if options.get("shell", "False") != "False":
                yield "a command through a shell"


@pytest.mark.parametrize("path", SOURCES, ids=[path.relative_to(ROOT).as_posix() for path in SOURCES])
def test_no_module_runs_code_from_data(path: Path) -> None:
    assert list(unsafe(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('a')",
        "torch.load('a', weights_only=False)",
        "np.load('a', allow_pickle=True)",
        "yaml.load('a', yaml.Loader)",
        "subprocess.run('a', shell=True)",
    ],
)
def test_an_unsafe_construct_is_detected(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


@pytest.mark.slow
def test_make_ui_listens_on_localhost_only(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = commands_environment() | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    # -o: the environment exists; it is not set up again.
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            ["make", "-o", "setup", "ui", f"UI_PORT={port}"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for_page(f"http://127.0.0.1:{port}/health", tmp_path / "log")
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) <= 4  # make, MLflow's command, its server and that one's helper
        listening = [c.laddr for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert port in {address.port for address in listening}
        assert {address.ip for address in listening} == {"127.0.0.1"}
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for_page(address: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
