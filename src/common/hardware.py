"""What the hardware supports, and how freed memory is handled."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from src.common.console import console

if TYPE_CHECKING:
    import torch


def device_of(accelerator: str) -> torch.device:
    """The device that `trainer.accelerator` names: auto, cpu or gpu."""
    import torch

    gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def device_here(accelerator: str) -> torch.device:
    """The same where it is there; without a GPU the CPU, which a line says."""
    import torch

    device = device_of(accelerator)
    if device.type == "cuda" and not torch.cuda.is_available():
        console.print(f"trainer.accelerator: {accelerator}, but torch sees no CUDA device here: computed on the CPU")
        return torch.device("cpu")
    return device


def describe_device(accelerator: str) -> str:
    """What the last bits depend on: cpu, or the GPU's name and the version of cuDNN."""
    import torch

    device = device_of(accelerator)
    if device.type == "cpu" or not torch.cuda.is_available():
        return device.type
    return f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere bf16 is slower than fp32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (bf16_tiles() or bool(torch.cpu._is_avx512_bf16_supported()))


def bf16_tiles() -> bool:
    """Whether the processor multiplies bf16 in tiles of 16 rows (Intel's AMX), which small operands leave empty."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of returning it and faulting it in again.

    An LSTM's training step on two CPU cores ran 1.3 to 1.6 times as fast (six pairs); elsewhere it changes nothing.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def release_freed_memory() -> None:
    """Returns freed memory to the system once, before allocations of other sizes that would not fit into its gaps."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cores() -> int:
    """The cores that this process may use: those it is bound to, or fewer by the quota of its container or job.

    macOS has neither: there, all of the machine's.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _cpu_quotas(Path("/")))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's control groups and of those around them (Linux; `root` is /)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0":  # version 2
            mount, files = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        path = Path(group)
        for folder in (path, *path.parents):  # a container sees its own group as the mount itself
            with contextlib.suppress(OSError, ValueError):  # not there; "max", which is no quota
                texts = [(mount / folder.relative_to("/") / name).read_text() for name in files]
                quota, period = (int(number) for number in " ".join(texts).split())
                if quota > 0:
                    yield quota / period
