"""Workers that call home: a cluster starts a process somewhere, which connects to the sweep and works for it."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import secrets
import select
import socket
import struct
import sys
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, Protocol

from src.common.errors import Failure
from src.sweeping.remote import END, keep_alive, log_of
from src.sweeping.space import SweepConfig
from src.sweeping.worker import Worker

INTRODUCES_ITSELF_WITHIN_S = 5  # a stranger at the port must not hold up the sweep
LOOK_EVERY_S = 2.0  # at the jobs that have not called: a look may cost a cluster's scheduler something
FAILURES = 3  # in a row, after which the next would fail as well


class Cluster(Protocol):
    """What starts a process somewhere."""

    host: str  # how its machines reach this one

    def start(self, command: list[str]) -> Any:
        """Queues a command, to be run in the repository's folder; returns what stands for it."""

    def ended(self, job: Any) -> str | None:
        """Why a job is over, in one line; None while it waits or runs."""

    def cancel(self, job: Any) -> None:
        """Takes a job back."""

    def close(self) -> None:
        """Leaves the cluster."""


class Caller(Worker):
    """A worker elsewhere, as the sweep sees it."""

    def __init__(self, connection: Connection, host: str) -> None:
        self.connection = connection
        self.host = host
        self.job = None

    def end(self) -> None:
        """Asks it to save and end."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(END)

    def leave(self) -> None:
        """It ends when it is hung up on."""

    @property
    def watched(self) -> list[Any]:
        """What becomes ready when it says something, or dies."""
        return [self.connection]

    @property
    def death(self) -> str:
        """How it died."""
        return f"the connection to {self.host} broke"


class Home:
    """A launcher: asks a cluster for workers, and opens to those that call."""

    def __init__(self, cluster: Cluster, config: SweepConfig, folder: Path) -> None:
        self.threads: int | None = max(1, config.sweep.resources.cpus // config.trainer.devices)
        self._cluster = cluster
        host = config.sweep.host or cluster.host
        self._door = socket.create_server(("127.0.0.1" if _is_loopback(host) else "", 0), backlog=128)
        self._key = secrets.token_bytes(32)
        folder.mkdir(parents=True, exist_ok=True)
        self._card = folder / "home.json"
        self._card.unlink(missing_ok=True)
        self._card.touch(mode=0o600)
        self._card.write_text(json.dumps({"host": host, "port": self._door.getsockname()[1], "key": self._key.hex()}))
        self._numbers = itertools.count()
        self._awaited: dict[int, Any] = {}
        self._failures = 0
        self._looked = 0.0

    @property
    def pending(self) -> int:
        return len(self._awaited)

    @property
    def watched(self) -> list[Any]:
        return [self._door]

    def request(self) -> None:
        number = next(self._numbers)
        log_of(self._card, number).unlink(missing_ok=True)  # an earlier sweep's
        command = [sys.executable, "-m", "src.sweeping.remote", str(self._card), str(number)]
        self._awaited[number] = self._cluster.start(command)

    def arrived(self) -> list[Worker]:
        workers: list[Worker] = []
        while select.select([self._door], [], [], 0)[0]:
            with contextlib.suppress(AuthenticationError, EOFError, OSError):  # a stranger, or one that died meanwhile
                workers.append(self._admitted())
        if workers:
            self._failures = 0
        elif time.monotonic() > self._looked + LOOK_EVERY_S:
            self._look()
        return workers

    def close(self) -> None:
        self._door.close()
        self._card.unlink(missing_ok=True)
        for job in self._awaited.values():
            self._cluster.cancel(job)
        self._cluster.close()

    def _admitted(self) -> Worker:
        called, _ = self._door.accept()
        called.setblocking(True)
        with called.dup() as same:
            connection = Connection(called.detach())
            try:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", INTRODUCES_ITSELF_WITHIN_S, 0))
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
                number, host = connection.recv()
                self._awaited.pop(number, None)
                same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
                keep_alive(connection)
            except BaseException:
                connection.close()
                raise
        return Caller(connection, host)

    def _look(self) -> None:
        """Names the jobs that ended before they called."""
        self._looked = time.monotonic()
        for number, job in list(self._awaited.items()):
            if (reason := self._cluster.ended(job)) is None:
                continue
            del self._awaited[number]
            self._failures += 1
            log = log_of(self._card, number)
            where = f" (its log: {log})" if log.exists() else ""
            print(f"worker {number} did not start: {reason}{where}", flush=True)
            if self._failures >= FAILURES:
                raise Failure(f"{FAILURES} workers in a row did not start, the last: {reason}{where}")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def outward(towards: str) -> str:
    """The address that this machine uses towards another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
        asks.connect((towards, 9))  # nothing is sent
        return str(asks.getsockname()[0])


def last_line(text: str) -> str:
    """The last line of an output that says anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
