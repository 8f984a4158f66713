"""A process of a run that another one leads: it trains what that one says, and leaves reports and files to it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

from src.training.launcher import PATIENCE_S


def follow() -> None:
    """Trains what the first process says, until there is no more; call it in a group of `src.training.ranks`.

    Exits with 1 where the first process is gone, which has said why, and where something fails in this one alone.
    """
    from torch import distributed

    from src.common.errors import Failure
    from src.common.hardware import keep_memory
    from src.configuration.composing import check
    from src.data import packed
    from src.training import determinism, ranks, run
    from src.training.trainer import require_gpus

    keep_memory()
    try:
        while orders := ranks.broadcast(None):
            content, root = orders
            config = check(content)
            require_gpus(config.trainer)
            determinism.fix(config.seed, config.trainer.threads_each)
            meta = packed.read_meta(config.processed)
            run.fit(config, meta, run.work_folder(config, meta, Path(root)), None)
    except (Failure, RuntimeError) as error:
        line = " ".join(str(error).split())
        print(f"process {distributed.get_rank()}, on {socket.gethostname()}: {line}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """The command that `src.training.ranks` runs: RANK WORLD PORT; stdin is open as long as the first process lives."""
    rank, world, port = map(int, sys.argv[1:])
    threading.Thread(target=_end_with_first, name="end-with-first", daemon=True).start()

    from src.training import startup

    startup.import_lightning()

    from torch import distributed

    from src.training import ranks

    ranks.join(rank, world, store=ranks.meeting_point(port, world))
    try:
        follow()
    finally:
        distributed.destroy_process_group()


def _end_with_first() -> None:
    sys.stdin.buffer.read()
    time.sleep(PATIENCE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
