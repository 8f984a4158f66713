"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from src.common import hardware


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


GROUPS = Path("sys", "fs", "cgroup")


@pytest.mark.parametrize(
    ("group", "files", "count"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),  # a container with 1.5 cores
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        # a container sees the host's path, but its own files
        ("4:cpu:/docker/abc", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("9:memory:/", {}, 64),
    ],
)
def test_a_quota_of_cpu_time_counts_as_so_many_cores(
    group: str, files: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "proc" / "self" / "cgroup", f"{group}\n")
    for name, text in files.items():
        write(tmp_path / GROUPS / name, f"{text}\n")
    quotas = hardware._cpu_quotas
    monkeypatch.setattr(hardware, "_cpu_quotas", lambda root: quotas(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert hardware.cores() == count


def test_without_affinity_and_control_groups_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert list(hardware._cpu_quotas(tmp_path)) == []
    monkeypatch.setattr(hardware, "_cpu_quotas", lambda root: iter(()))
    assert hardware.cores() == 12
