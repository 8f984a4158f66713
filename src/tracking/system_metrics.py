"""The load of the machine, under the names by which MLflow's page of system metrics shows it."""

from __future__ import annotations

import sys

import psutil

from src.common.clock_metrics import SYSTEM

MEGABYTE = 1e6


def system_metrics() -> dict[str, float]:
    """CPU, memory, and of each GPU in use the memory that torch has reserved on it.

    The GPU's figure is a counter of torch's allocator: a call to the driver could break the capture of a CUDA graph.
    """
    memory = psutil.virtual_memory()
    metrics = {
        "cpu_utilization_percentage": psutil.cpu_percent(),  # since the last call
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            metrics[f"gpu_{number}_memory_usage_megabytes"] = torch.cuda.memory_reserved(number) / MEGABYTE
    return {SYSTEM + name: round(value, 1) for name, value in metrics.items()}
