"""How many cores, and how much memory, a process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.common import hardware
from src.common.paths import ROOT


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


MEMINFO = "MemTotal: 900 kB\nMemAvailable: 600 kB\nSwapFree: 100 kB\n"


@pytest.mark.parametrize(
    ("group", "files", "kilobytes"),
    [
        ("9:cpu:/", {}, 700),
        ("0::/job", {"job/memory.max": "512000", "job/memory.stat": "anon 204800\nfile 300000"}, 300),
        ("0::/job", {"job/memory.max": "max", "job/memory.stat": "anon 204800"}, 700),
        ("0::/a/b", {"a/memory.max": "204800", "a/memory.stat": "anon 307200"}, 0),  # of the group around it
        (
            "4:memory:/job",
            {"memory/job/memory.limit_in_bytes": "512000", "memory/job/memory.stat": "cache 9\ntotal_rss 102400"},
            400,
        ),
    ],
)
def test_free_memory_is_the_systems_or_what_the_limit_of_a_container_leaves(
    group: str, files: dict[str, str], kilobytes: int, tmp_path: Path
) -> None:
    """The file cache counts as free."""
    write(tmp_path / "proc" / "meminfo", MEMINFO)
    write(tmp_path / "proc" / "self" / "cgroup", f"{group}\n")
    for name, text in files.items():
        write(tmp_path / GROUPS / name, f"{text}\n")
    assert hardware.free_memory(tmp_path) == 1024 * kilobytes


def test_where_the_system_does_not_say_free_memory_is_unknown(tmp_path: Path) -> None:
    assert hardware.free_memory(tmp_path) is None


LINUX_ONLY = (
    "sched_getaffinity",
    "sched_setaffinity",
    "pidfd_open",
    "memfd_create",
    "posix_fadvise",
    "eventfd",
    "splice",
)
IMPORT_ALL = """
import ctypes, importlib, os, pathlib, sys
for name in sys.argv[1:]:
    if hasattr(os, name):
        delattr(os, name)
for path in sorted(pathlib.Path("src").rglob("*.py")):
    if path.name not in ("__init__.py", "preload.py", "on_ray.py"):
        importlib.import_module(".".join(path.with_suffix("").parts))
from src.common import hardware
from src.common.paths import ROOT
hardware.keep_freed_memory()
print(hardware.cores())
"""


@pytest.mark.slow
@pytest.mark.long
def test_what_macos_lacks_is_not_needed_at_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *LINUX_ONLY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) > 0
