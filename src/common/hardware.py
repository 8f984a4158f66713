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


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate, swap included; None where the system does not say (not Linux).

    What the system has, or fewer by the limit of a container or job, where its file cache counts as free.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        free = 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"])
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return max(0, min([free, *_memory_quotas(root)]))


def _memory_quotas(root: Path) -> Iterator[int]:
    """The bytes that the memory limits of this process's control groups, and of those around them, leave."""
    for folder, is_second in _control_groups(root, "memory"):
        limit_file, entry = ("memory.max", "anon") if is_second else ("memory.limit_in_bytes", "total_rss")
        with contextlib.suppress(OSError, ValueError, KeyError):  # not there; "max", which is no limit
            limit = int((folder / limit_file).read_text())
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield limit - int(facts[entry])


def _cpu_quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's control groups and of those around them (Linux; `root` is /)."""
    for folder, is_second in _control_groups(root, "cpu"):
        files = ["cpu.max"] if is_second else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        with contextlib.suppress(OSError, ValueError):  # not there; "max", which is no quota
            quota, period = (int(number) for number in " ".join((folder / name).read_text() for name in files).split())
            if quota > 0:
                yield quota / period


def _control_groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control groups, and of those around them; whether they are of version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        is_second = number == "0"
        if not is_second and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" if is_second else root / "sys/fs/cgroup" / controller
        path = Path(group)
        for folder in (path, *path.parents):  # a container sees its own group as the mount itself
            yield mount / folder.relative_to("/"), is_second
