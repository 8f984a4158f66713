"""What a run depended on besides its configuration: code, locked packages, machine.

Everything is read from files, package metadata and two short git commands, so that it costs milliseconds and
imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from src.common.paths import ROOT

UNKNOWN = "unknown"
PACKAGES = ("torch", "torchvision", "pytorch-lightning")
# The instruction sets by which PyTorch's CPU kernels differ in speed and in their last bits.
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
# A git that hangs (a network file system, a credential prompt) must not hold a training up.
GIT_TIMEOUT_S = 5.0
PATCH_FILE_BYTES = 1_000_000
LEFT_OUT = "# left out: "


def environment(*, device: str = UNKNOWN, threads: int | None = None, root: Path = ROOT) -> dict[str, str]:
    """Describe the code, the packages and the machine as flat text, for tags and reports.

    `device` (such as "cpu" or "cuda:0") and `threads` (torch's intra-op thread count) are the caller's to give:
    asking torch would import it. What cannot be found out is "unknown"; nothing is raised.
    """
    commit, dirty = _git_state(root)
    model, flags = _cpu()
    return {
        "git.commit": commit,
        "git.dirty": dirty,
        "lock.sha256": _sha256(root / "requirements.lock"),
        "python": platform.python_version(),
        **{name: _package(name) for name in PACKAGES},
        "cuda": _torch_cuda(),
        "host": socket.gethostname(),
        "cpu": model,
        "cpu.isa": flags,
        "cpu.cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": UNKNOWN if threads is None else str(threads),
        "device": device,
    }


def dirty_patch(root: Path = ROOT) -> str:
    """Return what differs from the commit, as a patch that `git apply` takes; empty when clean or without git.

    Files that git does not know are in it, those over `PATCH_FILE_BYTES` as a leading line "# left out: NAME" alone.
    """
    index = _git(root, "rev-parse", "--path-format=absolute", "--git-path", "index")
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")[:-1]
    small = [name for name in untracked if (root / name).lstat().st_size <= PATCH_FILE_BYTES]
    notes = "".join(f"{LEFT_OUT}{name}\n" for name in untracked if name not in small)
    with tempfile.TemporaryDirectory() as folder:
        # On a copy of the index, where new files can be announced without the repository noticing.
        copy = Path(folder) / "index"
        with contextlib.suppress(OSError):
            shutil.copy((index or "").strip(), copy)
        if small:
            _git(root, "add", "--intent-to-add", "--", *small, index=copy)
        diff = _git(root, "diff", "--binary", "--no-ext-diff", "--no-color", "HEAD", index=copy)
    return notes + (diff or "")


def _git(root: Path, *arguments: str, index: Path | None = None) -> str | None:
    """Run git in `root`; None when git is missing, refuses or hangs. Takes no lock, so it disturbs no other git."""
    own_index = {"GIT_INDEX_FILE": str(index)} if index else {}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", **own_index},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _git_state(root: Path) -> tuple[str, str]:
    """The commit's hash and "true" or "false" for uncommitted changes, untracked files included."""
    status = _git(root, "status", "--porcelain=v2", "--branch")
    if status is None:
        return UNKNOWN, UNKNOWN
    found = re.search(r"^# branch\.oid ([0-9a-f]+)$", status, re.MULTILINE)
    dirty = any(not line.startswith("#") for line in status.splitlines())
    return found[1] if found else UNKNOWN, str(dirty).lower()


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return UNKNOWN


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return UNKNOWN


def _torch_cuda() -> str:
    """The CUDA version that torch was built for, "none" for a CPU build; read from its version.py, not imported."""
    spec = importlib.util.find_spec("torch")
    try:
        text = (Path(spec.origin).parent / "version.py").read_text() if spec and spec.origin else ""
    except OSError:
        text = ""
    found = re.search(r"^cuda\b[^=]*=\s*(?:'([^']+)'|None)", text, re.MULTILINE)
    return UNKNOWN if found is None else found[1] or "none"


def _cpu() -> tuple[str, str]:
    """The CPU's name and those of `ISA_FLAGS` that it has, separated by spaces."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if not line.strip():
                    break  # the first core speaks for all
                key, _, value = line.partition(":")
                fields[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or UNKNOWN, UNKNOWN
    if "flags" not in fields:
        return fields.get("model name", platform.machine()), UNKNOWN
    present = set(fields["flags"].split())
    return fields.get("model name", UNKNOWN), " ".join(flag for flag in ISA_FLAGS if flag in present) or "none"
