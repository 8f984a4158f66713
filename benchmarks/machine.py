"""The machine: its description, and its peak speed in matrix products."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version

import psutil
import torch

from benchmarks.setting import Setting
from benchmarks.table import Figure
from benchmarks.timing import Measure, paired, per_call
from src.common.hardware import device_of, fast_bf16
from src.tracking.provenance import environment


def description() -> dict[str, str]:
    """Date, processor, memory, GPU, versions and commit, as text."""
    run = environment()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": f"{run['cpu']}, {run['cpu.cores']} cores ({run['cpu.isa']}), {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": gpu,
        "python": run["python"],
        "packages": ", ".join(f"{name} {version(name)}" for name in ("torch", "pytorch-lightning", "onnxruntime")),
        "commit": run["git.commit"][:12] + (" and changes" if run["git.dirty"] == "true" else ""),
    }


def gemm(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> Measure:
    """Measures a large square matrix product repeatedly; returns seconds per floating-point operation."""
    size = 8192 if device.type == "cuda" else 2048  # large enough to be bound by compute, not by memory
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()

    timed = per_call(product, seconds)
    return lambda: timed() / (2 * size**3)


def measure(setting: Setting) -> list[Figure]:
    """The peak in fp32, and in bf16 where the hardware multiplies it (elsewhere one product takes minutes).

    The best of many short rounds is the machine's, the median what other load leaves.
    """
    device = device_of(setting.compose(setting.experiments[0]).trainer.accelerator)
    types = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if fast_bf16(device) else {})
    rounds = paired({name: gemm(dtype, device, seconds=0.1) for name, dtype in types.items()}, 4 * setting.rounds)
    return [
        Figure("machine", f"matrix product, {name}", rounds.spread(name, lambda s: 1e-9 / s), "GFLOP/s")
        for name in types
    ]
