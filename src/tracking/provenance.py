"""Records what a run depends on besides its configuration: code, locked packages, machine.

Everything is read from files, package metadata and two short git commands, so that it costs milliseconds and
imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import platform
import re
import shutil
import socket
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from src.common.credentials import masked
from src.common.errors import Failure
from src.common.files import sha256_of
from src.common.git import git
from src.common.hardware import cores
from src.common.paths import ROOT

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
PACKAGES = ("torch", "torchvision", "pytorch-lightning")
# The instruction sets by which PyTorch's CPU kernels differ in speed and in their last bits.
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
# A git that hangs (a network file system, a credential prompt) must not hold a training up.
GIT_TIMEOUT_S = 5.0
PATCH_FILE_BYTES = 1_000_000
# What a run can depend on. Of untracked files only those of these kinds: a .env or a key beside the code is left out.
PATCH_PATHS = ("src", "conf", "params.yaml", "dvc.yaml", "pyproject.toml", "requirements.lock")
PATCH_SUFFIXES = (".py", ".yaml", ".yml", ".toml", ".lock")
_SECRET_NAME = re.compile(r"(?i)secret|credential|passw|token")
LEFT_OUT = "# left out: "


def environment(*, device: str = UNKNOWN, threads: int | None = None, root: Path = ROOT) -> dict[str, str]:
    """Describes the code, the packages and the machine as flat text, for tags and reports.

    The caller passes `device` (see `describe_device`) and `threads` (torch's intra-op thread count), since asking
    torch would import it. A value that can't be determined is "unknown"; nothing is raised.
    """
    commit, dirty = _git_state(root)
    model, flags = _cpu()
    return {
        "git.commit": commit,
        "git.dirty": dirty,
        "lock.sha256": _lock_sha256(root),
        "python": platform.python_version(),
        **{name: _package(name) for name in PACKAGES},
        "cuda": _torch_cuda(),
        "host": socket.gethostname(),
        "cpu": model,
        "cpu.isa": flags,
        "cpu.cores": str(cores()),
        "threads": UNKNOWN if threads is None else str(threads),
        "device": device,
        "gpu.driver": _driver(),
    }


def dirty_patch(root: Path = ROOT) -> str:
    """The difference to the commit, as a patch that `git apply` takes; empty when there is none, or no git.

    It holds the files that a run can depend on. Untracked files are part of it, except for those that git ignores or
    that look like secrets; of those over `PATCH_FILE_BYTES` a leading line "# left out: NAME" alone. Credentials in
    addresses are masked, except in Python.
    """

    def run(*arguments: str, index: Path | None = None) -> str:
        return git(*arguments, cwd=root, index=index, timeout_s=GIT_TIMEOUT_S)

    with contextlib.suppress(Failure), tempfile.TemporaryDirectory() as folder:
        listed = run("ls-files", "--others", "--exclude-standard", "-z", "--", *PATCH_PATHS).split("\0")[:-1]
        untracked = [name for name in listed if _is_code_or_configuration(Path(name))]
        small = [name for name in untracked if (root / name).lstat().st_size <= PATCH_FILE_BYTES]
        # On a copy of the index, so that the repository's own stays as it is; with its time, since git re-reads files
        # that were changed in the second in which the index was written.
        index = Path(folder) / "index"
        with contextlib.suppress(OSError):
            shutil.copy2(run("rev-parse", "--path-format=absolute", "--git-path", "index").strip(), index)
        if small:
            run("add", "--intent-to-add", "--", *small, index=index)
        notes = "".join(f"{LEFT_OUT}{name}\n" for name in untracked if name not in small)
        patch = run("diff", "--binary", "--no-ext-diff", "--no-color", "HEAD", "--", *PATCH_PATHS, index=index)
        sections = re.split(r"(?m)^(?=diff --git )", patch)
        is_python = re.compile(r"diff --git .*\.py\n")
        return notes + "".join(text if is_python.match(text) else masked(text) for text in sections)
    return ""


def _is_code_or_configuration(path: Path) -> bool:
    """Whether an untracked file is recorded; the name of a Python file may hold "token"."""
    return path.suffix == ".py" or (path.suffix in PATCH_SUFFIXES and not _SECRET_NAME.search(path.name))


def _git_state(root: Path) -> tuple[str, str]:
    """The commit's hash, and "true" or "false" for uncommitted changes, untracked files included."""
    try:
        status = git("status", "--porcelain=v2", "--branch", cwd=root, timeout_s=GIT_TIMEOUT_S)
    except Failure as error:
        if (root / ".git").exists():
            dubious = "dubious ownership" in str(error)
            remedy = f"git config --global --add safe.directory {root}" if dubious else "check `git status`"
            reason = "the folder belongs to another user" if dubious else str(error)
            log.warning("the run's commit and changes are not recorded (%s): %s", reason, remedy)
        return UNKNOWN, UNKNOWN
    commit = re.search(r"^# branch\.oid ([0-9a-f]+)$", status, re.MULTILINE)
    is_dirty = any(not line.startswith("#") for line in status.splitlines())
    return commit[1] if commit else UNKNOWN, str(is_dirty).lower()


def _lock_sha256(root: Path) -> str:
    try:
        return sha256_of(root / "requirements.lock")
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
    match = re.search(r"^cuda\b[^=]*=\s*(?:'([^']+)'|None)", text, re.MULTILINE)
    return UNKNOWN if match is None else match[1] or "none"


def _driver() -> str:
    """The version of NVIDIA's driver; "none" without one."""
    try:
        match = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "none"
    return match[0] if match else UNKNOWN


def _cpu() -> tuple[str, str]:
    """The CPU's name and those of `ISA_FLAGS` that it has, separated by spaces."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if not line.strip():
                    break  # all cores are alike
                key, _, value = line.partition(":")
                fields[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or UNKNOWN, UNKNOWN
    if "flags" not in fields:
        return fields.get("model name", platform.machine()), UNKNOWN
    present = set(fields["flags"].split())
    return fields.get("model name", UNKNOWN), " ".join(flag for flag in ISA_FLAGS if flag in present) or "none"
