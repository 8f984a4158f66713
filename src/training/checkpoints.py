"""Working checkpoints: written so that a crash at any moment leaves a good one, and found again without a path.

They live outside DVC's outputs, in `experiments/.work/<fingerprint>`. The fingerprint is of everything that the bits
of a run depend on: configuration, data, code. The same command finds its own unfinished run; any other never does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pytorch_lightning.plugins.io import CheckpointIO

from src.config import ROOT
from src.errors import Failure
from src.files import sha256_of, write_atomically

WORK = ROOT / "experiments" / ".work"
CODE = ("src/data", "src/models", "src/training", "src/train.py", "src/config.py")


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, flushes to the disk, renames; a sha256 stands beside each checkpoint.

    While a checkpoint is replaced, the digest file names the old bytes and the new: whenever and however often that is
    interrupted, what lies there stays known. Lightning's own stages in $TMPDIR: on another file system a kill leaves
    half a checkpoint, a full disk destroys the old.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        write_atomically(digests(path), " ".join([*known_digests(path), sha256]).encode())
        write_atomically(path, content)
        write_atomically(digests(path), sha256.encode())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        for name in (Path(path), digests(Path(path))):
            name.unlink(missing_ok=True)


def digests(path: Path) -> Path:
    """The file that names the sha256 of a checkpoint."""
    return path.with_name(path.name + ".sha256")


def known_digests(path: Path) -> list[str]:
    """The sha256 that a checkpoint may have: one, or several where a save did not get to its end."""
    return digests(path).read_text().split() if digests(path).is_file() else []


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's bytes are those that were written."""
    return path.is_file() and sha256_of(path) in known_digests(path)


def fingerprint(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """16 hex digits of everything that the bits of a training run depend on, as far as this repository knows it.

    `config`: the sections that training reads. `data`: the sha256 of each packed split.
    """
    digest = hashlib.sha256(json.dumps([config, data], sort_keys=True).encode())
    for room in CODE:
        paths = sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / room]
        for path in paths:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update((ROOT / "requirements.lock").read_bytes())
    digest.update(str(torch.get_num_threads()).encode())
    return digest.hexdigest()[:16]


class WorkFolder:
    """The folder of one unfinished run: its checkpoints, its MLflow journal."""

    def __init__(self, key: str, root: Path = WORK) -> None:
        self.path = root / key
        self.last = self.path / "last.ckpt"
        self.journal = self.path / "tracking.jsonl"

    @contextlib.contextmanager
    def held(self) -> Iterator[WorkFolder]:
        """Holds the folder against a second run of the same thing.

        Raises:
            Failure: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / "holder"
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Failure(
                f"this very run is under way already, by {_read(holder)}: wait for it, or stop it ({self.path})"
            ) from None
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield self
        finally:
            lock.release()

    def resumable(self) -> Path | None:
        """The checkpoint to go on from, if there is a whole one; a damaged one is said and removed."""
        if is_whole(self.last):
            return self.last
        if self.last.exists():
            print(f"{self.last} is damaged (its sha256 differs): not resumed, training starts anew", flush=True)
            self.last.unlink()
        return None

    def forget(self) -> None:
        """Removes what only a resume needs: the run is complete. An unsent journal stays."""
        for path in self.path.glob("*.ckpt*"):
            path.unlink()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return "another process"
