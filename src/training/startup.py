"""A process that computes: Lightning imported quickly, an end at once."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

# torchmetrics, which Lightning imports, imports these where they are installed: 2.4 of 5.3 seconds where it was
# measured (scipy.signal for audio metrics 1.0, torchvision for picture metrics 0.3 on top of its compiler, matplotlib
# 0.3).
NOT_NEEDED = ("scipy", "torchvision", "matplotlib")


def import_lightning() -> None:
    """Imports torch and Lightning; torchmetrics is told that its optional helpers are not installed.

    Nor is Triton, where there is no GPU to compile for. Call it before anything else imports Lightning; later it has no
    effect.
    """
    from unittest.mock import patch

    import torch
    from lightning_utilities.core import imports

    check, available = imports.RequirementCache._check_requirement, imports.package_available

    def check_without(self: Any) -> None:
        if self.requirement.partition(">")[0] in NOT_NEEDED:
            self.available, self.message = False, "not needed here (src/training/startup.py)"
        else:
            check(self)

    with (
        patch.object(imports.RequirementCache, "_check_requirement", check_without),
        patch.object(imports, "package_available", lambda name: name not in NOT_NEEDED and available(name)),
        contextlib.nullcontext() if torch.cuda.is_available() else _without_triton(),
    ):
        import pytorch_lightning  # noqa: F401


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """Keeps torch._dynamo, which Lightning imports, from loading the compiler for GPUs: 0.07 GiB, 0.3 s."""
    complaint = logging.getLogger("torch.utils.flop_counter")
    level = complaint.level
    complaint.setLevel(logging.ERROR)
    modules: dict[str, Any] = sys.modules
    modules.setdefault("triton", None)  # Python's way to say that it can't be imported
    try:
        yield
    finally:
        if modules["triton"] is None:
            del modules["triton"]
        complaint.setLevel(level)


def leave() -> None:
    """Ends the process with exit code 0, after its threads and all that is registered for its end.

    As `multiprocessing` ends its processes: Python's and the libraries' own ends take as long as a quarter of their
    imports, and touch 0.1 GiB of CUDA's libraries for the first time where there is no GPU.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads as Python does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
