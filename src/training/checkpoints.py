"""Working checkpoints: a crash at any moment leaves a good one, and the same command finds it without a path.

They live outside DVC's outputs, in `experiments/.work/<fingerprint>`. The fingerprint is of everything that the bits
of a run depend on: configuration, data, code. The same command finds its own unfinished run; any other never does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from src.common.console import console
from src.common.errors import Failure
from src.common.files import replacing, sha256_of, write_atomically, write_text_atomically
from src.common.hardware import describe_device
from src.common.identity import described, differences, fingerprint
from src.common.paths import WORK
from src.configuration.fingerprints import stage_code
from src.configuration.schema import Config, plain

LAST, NOTE = "last.ckpt", "run.json"


class AtomicCheckpointIO(CheckpointIO):
    """Replaces checkpoints atomically, with a sha256 beside each.

    While a checkpoint is replaced, the digest file names the old bytes and the new, so the file can be verified
    whenever the save is interrupted. Lightning's own writes to $TMPDIR first: on another file system a kill leaves half
    a checkpoint, and a full disk destroys the old one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            Failure: a weight, a statistic or the optimizer's state is NaN or infinite; the old checkpoint stays.
        """
        path = Path(path)
        if not is_finite([checkpoint.get(part) for part in ("state_dict", "optimizer_states")]):
            raise Failure(f"{path} is not written: a value of the model or its optimizer is NaN or infinite")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            writer = _HashingWriter(file)
            torch.save(checkpoint, writer)  # type: ignore[arg-type]  # torch calls `write` and `flush` alone
            sha256 = writer.sha256()
            write_atomically(digest_file(path), " ".join([*known_digests(path), sha256]).encode())
        write_atomically(digest_file(path), sha256.encode())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # its digest is right, yet `save_checkpoint` did not write it
            raise Failure(
                f"{path} is no training's state ({type(error).__name__}; nothing in it was run): "
                f"delete {Path(path).parent} and train again"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        for name in (Path(path), digest_file(Path(path))):
            name.unlink(missing_ok=True)


@torch.no_grad()
def is_finite(state: Any) -> bool:
    """Whether no tensor in nested mappings and lists has a NaN or an infinity; one transfer from a GPU."""
    sums: dict[torch.device, list[Tensor]] = {}  # Adam counts its steps on the CPU
    for tensor in _tensors(state):
        if tensor.is_floating_point():
            sums.setdefault(tensor.device, []).append(tensor.sum(dtype=torch.float64))
    return all(bool(torch.stack(each).isfinite().all()) for each in sums.values())


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        for part in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors(part)


class _HashingWriter:
    """Writes to a file and hashes the bytes on the way: a checkpoint is never in memory a second time."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:  # no exception may pass through torch's C code
                self.error = error
        self.hash.update(content)
        return len(content)

    def flush(self) -> None:
        """No-op: the file's owner flushes."""

    def sha256(self) -> str:
        """The sha256 of all that was written.

        Raises:
            OSError: a write failed.
        """
        if self.error is not None:
            raise self.error
        return self.hash.hexdigest()


def digest_file(path: Path) -> Path:
    """The file that holds the sha256 of a checkpoint."""
    return path.with_name(path.name + ".sha256")


def known_digests(path: Path) -> list[str]:
    """The sha256 that a checkpoint may have: one, or several after an interrupted save."""
    return digest_file(path).read_text(errors="replace").split() if digest_file(path).is_file() else []


def is_intact(path: Path) -> bool:
    """Whether a checkpoint's bytes are those that were written."""
    return path.is_file() and sha256_of(path) in known_digests(path)


def identity(config: Config, splits: Mapping[str, Any], weights: Mapping[str, str]) -> dict[str, str]:
    """Everything that the bits of a training depend on, as far as this repository knows it, by name.

    `splits`: the sha256 of each packed split; `weights`: that of each file of weights that training begins with. The
    code is the train stage's, as DVC watches it; of its packages the versions count that are installed.
    """
    sections = {key: value for key, value in config.plain().items() if key in ("seed", "model", "trainer")}
    code = stage_code("train", config)
    return {
        **described(sections | {"loader": plain(config.loader), "data": splits}),
        **code.modules,
        **{f"package {name}": version(name) for name in code.packages},
        "threads": str(torch.get_num_threads()),
        "device": describe_device(config.trainer.accelerator),
        **{f"{source} weights": sha256 for source, sha256 in weights.items()},
    }


@contextlib.contextmanager
def lock_folder(folder: Path, what: str) -> Iterator[None]:
    """Locks a folder against other processes; its file `holder` names this one. An empty folder is removed at the end.

    Raises:
        Failure: another process has locked it: `what` is under way.
    """
    holder = folder / "holder"
    lock = FileLock(folder / "lock")
    try:
        _acquire(lock, folder)
    except Timeout:
        raise Failure(f"{what} is under way already, by {_read(holder)}: wait for it, or stop it ({folder})") from None
    try:
        write_text_atomically(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        _remove_lock(lock, folder)


def _acquire(lock: FileLock, folder: Path) -> None:
    """Acquires the lock in a folder, which is made; its last holder may be removing it just then."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock.acquire(timeout=0)
            return


def _remove_lock(lock: FileLock, folder: Path) -> None:
    """Releases the lock and removes its file, while it is held: whoever has opened it sees that it is gone."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
    with contextlib.suppress(OSError):  # the folder is not empty
        folder.rmdir()


class WorkFolder:
    """The folder of one unfinished run of `experiment`: its checkpoints, its MLflow journal."""

    def __init__(self, experiment: str, identity: Mapping[str, str], root: Path = WORK) -> None:
        self.experiment = experiment
        self.identity = dict(identity)
        self.key = fingerprint(identity)
        self.path = root / self.key
        self.last = self.path / LAST
        self.journal = self.path / "tracking.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[WorkFolder]:
        """Locks the folder against a second run of the same configuration.

        Raises:
            Failure: another process has locked it.
        """
        with lock_folder(self.path, "this very run"):
            note = {"experiment": self.experiment, "identity": self.identity}
            write_atomically(self.path / NOTE, json.dumps(note, indent=1).encode())
            yield self

    def resumable(self) -> Path | None:
        """The checkpoint to resume from, if there is an intact one.

        Prints a line where a damaged one is removed, and where the experiment has an unfinished run that differs.
        """
        if is_intact(self.last):
            return self.last
        if self.last.exists():
            console.print(f"{self.last} is damaged (its sha256 differs): not resumed, training starts anew")
            self.last.unlink()
        elif other := self._unfinished():
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime((other / LAST).stat().st_mtime))
            changed = "; ".join(differences(_note(other).get("identity", {}), self.identity))
            console.print(
                f"the unfinished run of {when} in {other} is not resumed, it is another: {changed}. "
                "Training starts anew; that checkpoint stays until `make clean`"
            )
        return None

    def _unfinished(self) -> Path | None:
        """The folder of the newest other run of this experiment that is not under way and has an intact checkpoint."""
        runs = []
        for folder in self.path.parent.glob("*/"):
            last = folder / LAST
            if folder == self.path or _note(folder).get("experiment") != self.experiment or not is_intact(last):
                continue
            with contextlib.suppress(Timeout):
                lock = FileLock(folder / "lock")
                lock.acquire(timeout=0)
                runs.append((last.stat().st_mtime, folder))
                _remove_lock(lock, folder)
        return max(runs)[1] if runs else None

    def remove_checkpoints(self) -> None:
        """Removes what only a resume needs, of a complete run. An unsent journal stays."""
        for path in (*self.path.glob("*.ckpt*"), self.path / NOTE):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # an unsent journal is in it
            self.path.rmdir()


def _note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return "another process"
