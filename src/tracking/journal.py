"""The local journal of a run: a file of JSON lines, a header first, then one record a line.

It is the authoritative record. A state file beside it holds how far it was sent to a store. A kill may tear the last
line; nothing else can be lost. Names and texts are stored in the form that MLflow accepts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import posixpath
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.common.files import write_atomically
from src.common.paths import WORK

# MLflow's own limits (mlflow.utils.validation); the tests compare them.
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_NAME_LENGTH = 250


@dataclass(frozen=True)
class State:
    """How far a journal was sent: its first `sent` bytes are in `store`, in the run `run_id`."""

    journal: str
    store: str
    run_id: str | None = None
    joined: bool = False
    sent: int = 0


def stage_journal(experiment: str, stage: str) -> Path:
    """The journal of a stage that joins the training's run: one for each process."""
    return WORK / f"{experiment}-{stage}-{os.getpid()}.jsonl"


def create(journal: Path, header: Mapping[str, Any]) -> None:
    """Begins a journal with `header`, and a fresh identity if it has none; an unsent one in its place is moved aside.

    Raises:
        OSError: it cannot be written.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    _set_aside(journal)
    _write_line(journal, {"journal": uuid.uuid4().hex, "time": now(), **header})


def append(file: int, record: Mapping[str, Any]) -> None:
    """Appends a record atomically to a journal that is open as the append-only descriptor `file`.

    One `write`: no lock, and nothing to flush at a kill.

    Raises:
        OSError: it cannot be written.
    """
    line = (json.dumps(record) + "\n").encode()
    written = os.write(file, line)
    if written < len(line):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError("the disk is full")


def read_header(journal: Path) -> dict[str, Any] | None:
    """The first line of a tracking journal; None if the file is missing or is something else."""
    try:
        with journal.open("rb") as lines:
            header = json.loads(lines.readline())
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) and "journal" in header else None


def records(journal: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (the offset where the record ends, record) from the offset `start` in bytes; the header is not a record.

    Stops before a last line without its newline: it is being written, or was torn by a kill. A line that is not JSON
    becomes the record {"damaged": line}.
    """
    with journal.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            start += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = {"damaged": line.decode(errors="replace")}
            if "journal" not in record:
                yield start, record


def cut_torn_line(journal: Path) -> None:
    """Removes a last line without its newline, so that the next record does not continue it."""
    os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def count_unsent(journal: Path) -> int:
    """Records that are in the journal and not in the store; 0 if the journal is gone, since then all were sent."""
    header = read_header(journal)
    if header is None:
        return 0
    state = load_state(journal)
    start = state.sent if state and state.journal == header["journal"] else 0
    return sum(1 for _ in records(journal, start))


def load_state(journal: Path) -> State | None:
    """The saved state; None if there is none that can be read."""
    try:
        return State(**json.loads(state_path(journal).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def save_state(journal: Path, state: State) -> None:
    """Saves how far the journal was sent, atomically."""
    _write_line(state_path(journal), asdict(state))


def remove(journal: Path) -> None:
    """Removes the journal and the files beside it, and the folder of the run if nothing else is in it."""
    for path in (journal, state_path(journal), lock_path(journal)):
        path.unlink(missing_ok=True)
    shutil.rmtree(artifacts_folder(journal), ignore_errors=True)
    if journal.parent != WORK:
        with contextlib.suppress(OSError):
            journal.parent.rmdir()


def state_path(journal: Path) -> Path:
    """The file of the journal's state."""
    return journal.with_name(journal.name + ".state")


def lock_path(journal: Path) -> Path:
    """The lock file of a journal that is being sent."""
    return journal.with_name(journal.name + ".lock")


def artifacts_folder(journal: Path) -> Path:
    """The folder of copies of artifacts whose originals may be gone before they are sent."""
    return journal.with_name(journal.name + ".artifacts")


@functools.lru_cache(maxsize=4096)
def clean_name(name: str) -> str:
    """The nearest name that MLflow accepts: its alphabet, its length, and no relative or absolute path."""
    clean = re.sub(r"[^/\w.\- :]", "_", name)[:MAX_NAME_LENGTH]
    if posixpath.normpath(clean) != clean or clean.startswith(("/", "..")) or clean == ".":
        clean = clean.replace("/", "_").lstrip(".") or "_"
    return clean


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags with names and lengths that MLflow accepts."""
    return {clean_name(key): shorten(str(value), MAX_TAG_LENGTH) for key, value in tags.items()}


def shorten(text: str, length: int) -> str:
    """At most `length` characters of the text, an ellipsis last where it was cut."""
    return text if len(text) <= length else text[: length - 1] + "…"


def now() -> int:
    """Milliseconds since 1970, MLflow's unit."""
    return time.time_ns() // 1_000_000


def _set_aside(journal: Path) -> None:
    """Makes room for a new journal; one with unsent records is renamed after its identity, for `src.sync` to send."""
    header = read_header(journal)
    if header is not None and count_unsent(journal):
        aside = journal.with_name(f"{journal.stem}-{header['journal'][:8]}{journal.suffix}")
        journal.rename(aside)
        if state_path(journal).exists():
            state_path(journal).rename(state_path(aside))
    state_path(journal).unlink(missing_ok=True)


def _write_line(path: Path, line: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(line) + "\n").encode(), mode=0o600)  # a store's address may hold a password
