"""Digests of large files, noted so that a second start does not read all of them again.

A file counts as unchanged while its inode, size and times of modification and of status change are those of the note,
as DVC's own cache of digests has it. What changes bytes without the file system's knowledge, a failing disk, is seen in
files up to `NOTED` only, which are read at every start.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from src.common.files import sha256_of, write_text_atomically
from src.common.identity import fingerprint
from src.common.paths import WORK

NOTED = 2**30  # bytes; the digest of a larger file is noted
SETTLED_NS = 2 * 10**9  # a file that changed less than this ago may change again within one tick of its clock
NOTES = WORK / "digests"


def noted_sha256(path: Path) -> str:
    """The sha256 of a file's content; of a large file that has not changed since it was last read, as noted then."""
    state = _state(path)
    if state["size"] <= NOTED:
        return sha256_of(path)
    note = NOTES / f"{fingerprint(str(path.resolve()))}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        noted = json.loads(note.read_text())
        if noted["state"] == state:
            return str(noted["sha256"])
    started = time.time_ns()
    sha256 = sha256_of(path)
    if _state(path) == state and max(state["mtime_ns"], state["ctime_ns"]) < started - SETTLED_NS:
        with contextlib.suppress(OSError):  # no room, or read-only: it is read again at the next start
            NOTES.mkdir(parents=True, exist_ok=True)
            write_text_atomically(note, json.dumps({"path": str(path), "state": state, "sha256": sha256}))
    return sha256


def _state(path: Path) -> dict[str, Any]:
    """What changes with a file's content, as the file system knows it."""
    facts = path.stat()
    return {
        "device": facts.st_dev,
        "inode": facts.st_ino,
        "size": facts.st_size,
        "mtime_ns": facts.st_mtime_ns,
        "ctime_ns": facts.st_ctime_ns,
    }
