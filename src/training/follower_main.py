"""The command of the processes of a run beside the first one, which `src.training.ranks` starts: RANK WORLD PORT.

They train what the first process broadcasts, and leave reports and files to it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

from src.common.console import console
from src.common.garbage import collector_paused
from src.training.launcher import PEER_TIMEOUT_S


def follow() -> None:
    """Trains the configurations that the first process broadcasts until it broadcasts None; call it in a process group.

    Exits with 1 where the first process is gone, which has printed why, and where something fails in this one alone.
    """
    with collector_paused():
        from torch import distributed

        from src.common.errors import Failure
        from src.common.hardware import keep_freed_memory
        from src.configuration.composing import check
        from src.data import packed
        from src.training import determinism, ranks, run
        from src.training.trainer import require_gpus

    keep_freed_memory()
    try:
        while message := ranks.broadcast(None):
            content, root = message
            config = check(content)
            require_gpus(config.trainer)
            determinism.fix(config.seed, config.trainer.threads_each)
            meta = packed.read_meta(config.processed)
            run.fit(config, meta, run.work_folder(config, meta, Path(root)), None)
    except (Failure, RuntimeError) as error:
        line = " ".join(str(error).split())
        console.error(f"process {distributed.get_rank()}, on {socket.gethostname()}: {line}")
        ranks.abort_group()
        sys.exit(1)


def main() -> None:
    """The command; stdin is open as long as the first process lives."""
    rank, world_size, port = map(int, sys.argv[1:])
    threading.Thread(target=_exit_with_first, name="exit-with-first", daemon=True).start()
    with collector_paused():
        from src.training import ranks

    ranks.init_group(rank, world_size, store=ranks.tcp_store(port, world_size))
    with ranks.leaving_group():
        follow()


def _exit_with_first() -> None:
    """Ends this process where the first one has died, whose end of the pipe is closed then."""
    sys.stdin.buffer.read()
    time.sleep(PEER_TIMEOUT_S)
    os._exit(1)


if __name__ == "__main__":
    main()
