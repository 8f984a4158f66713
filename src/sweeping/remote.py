"""A worker on another machine: it calls the sweep that asked for it, and then trains what it is told.

    python -m src.sweeping.remote CARD NUMBER

A launcher starts it. CARD is a file that says where the sweep is, with the key to it; only its owner can read it. What
the worker prints goes into a file beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection
from pathlib import Path

from src.sweeping.worker import work

END = b"end"  # among pickled messages to a worker: it is to save and end
SAVES_WITHIN_S = 30.0
# A machine that vanished is noticed within 50 s, whether or not anything is being said.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 50_000}


def keep_alive(connection: Connection) -> None:
    """Has a TCP connection break when the other machine is gone."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux's
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def log_of(card: Path, number: int) -> Path:
    """Where a worker's output goes."""
    return card.with_name(f"worker-{number}.log")


def main(card: Path, number: int) -> None:
    """Works for the sweep until it hangs up, asks for the end, or this process's parent is gone."""
    with log_of(card, number).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sweep = json.loads(card.read_text())
    wire = Client((sweep["host"], sweep["port"]), authkey=bytes.fromhex(sweep["key"]))
    keep_alive(wire)
    wire.send((number, socket.gethostname()))
    # The worker reads its connection only between trials and validations: what is urgent is read by a thread.
    workers, here = Pipe()
    threading.Thread(target=_receive, args=(wire, here), name="from-sweep", daemon=True).start()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="end-with-parent", daemon=True).start()
    sending = threading.Thread(target=_send, args=(here, wire), name="to-sweep", daemon=True)
    sending.start()
    work(workers)
    workers.close()
    sending.join(SAVES_WITHIN_S)


def _receive(wire: Connection, here: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = wire.recv_bytes()
            if message == END:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                here.send_bytes(message)
    _save_and_end()


def _send(here: Connection, wire: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            wire.send_bytes(here.recv_bytes())


def _end_with_parent(parent: int) -> None:
    """The cluster's own process on this machine: where it is gone, so is the right to be here."""
    while os.getppid() == parent:
        time.sleep(1.0)
    _save_and_end()


def _save_and_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVES_WITHIN_S)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
