"""Runs the project's commands in processes forked from one that has imported the libraries, which takes seconds.

Each command imports the project's own modules itself, from its working directory. All commands of one server share
their hash seed: what must not depend on it is tested with processes of its own.
"""

from __future__ import annotations

import array
import functools
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Imported before the forks. Not onnxruntime, whose threads do not survive a fork.
LIBRARIES = (
    "filelock",
    "hydra.main",
    "hydra._internal.hydra",
    "matplotlib.pyplot",
    "mlflow.store.tracking.sqlalchemy_store",
    "onnx",
    "onnxscript",
    "optuna",
    "psutil",
    "pytorch_lightning",
    "safetensors.torch",
    "sqlalchemy.dialects.sqlite",
    "torch",
    "torchmetrics",
)
ROOT = Path(__file__).resolve().parent.parent
MAX_REQUEST_BYTES = 1 << 17


def start_command(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], stderr: int = subprocess.STDOUT
) -> subprocess.Popen[str]:
    """Starts a command: one of the project's from the fork server, another one in a process group of its own."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    if words[0] in ("python", sys.executable) and words[1] == "-m" and words[2].startswith("src."):
        return ForkedCommand(words[2:], cwd=folder, env=environment, **streams)
    return subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True, **streams)


class ForkedCommand(subprocess.Popen[str]):
    """`python -m args`, started by the fork server. Overrides private methods of Popen, checked with Python 3.11."""

    def _execute_child(self, args: Sequence[str], *options: Any) -> None:
        _, _, _, _, folder, environment, *_ = options
        pipes: Any = options[9:15]  # stdin, stdout, stderr: the child's and this process's ends
        request = {"words": list(args), "folder": str(folder), "environment": dict(environment)}
        self._status, answer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answer:
            socket.send_fds(server(), [json.dumps(request).encode()], [pipes[3], pipes[5], answer.fileno()])
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        self._child_created = True
        self.pid = self._receive(0)

    def _receive(self, flags: int) -> int:
        (number,) = array.array("i", self._status.recv(array.array("i").itemsize, flags))
        return int(number)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        try:
            return self.pid, self._receive(socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


@functools.cache
def server() -> socket.socket:
    """The connection to this process's server, which ends with it."""
    from src.tracking.store import QUIET_AND_BOUNDED  # with which the commands import MLflow

    connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        words = [sys.executable, "-E", "-m", "tests.fork_server", str(other.fileno())]
        subprocess.Popen(words, cwd=ROOT, env=os.environ | QUIET_AND_BOUNDED, pass_fds=[other.fileno()])
    return connection


def serve(connection: socket.socket) -> str | None:
    """Forks a process for each request and reports its id and its exit; returns the module to run in the new process.

    Without a return value the other end is closed.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not connection:
                    child, status = key.data
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    _send(status, os.waitpid(child, 0)[1])
                    os.close(status)
                    continue
                content, descriptors, *_ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
                if not content:
                    return None
                stdout, stderr, status = descriptors
                if (child := os.fork()) == 0:
                    os.close(status)
                    return become(stdout, stderr, **json.loads(content))
                os.close(stdout)
                os.close(stderr)
                _send(status, child)
                selector.register(os.pidfd_open(child), selectors.EVENT_READ, (child, status))


def _send(status: int, number: int) -> None:
    os.write(status, array.array("i", [number]).tobytes())


def become(stdout: int, stderr: int, words: Sequence[str], folder: str, environment: Mapping[str, str]) -> str:
    """Gives this process the streams, folder, environment and arguments of a command; returns the command's module."""
    with open(os.devnull) as stdin:
        for new, old in enumerate((stdin.fileno(), stdout, stderr)):
            os.dup2(old, new)
    os.closerange(3, 256)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a script ignore it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = words[1:]
    sys.path[0:1] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return words[0]


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    if module := serve(socket.socket(fileno=int(sys.argv[1]))):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
