"""A split three times as large as the memory that there is gives the bits of one that fits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.common.paths import ROOT
from src.data import packed
from src.data.writing import write_packed

LIMIT = 32 * 2**20
IMAGES = 3 * LIMIT // (3 * 64 * 64)
GROUPS = Path("/sys/fs/cgroup/memory")  # version 1; of version 2 a process can't enter a group of its own making
# Imports and the first batch come before the limit: it is on what the batches take.
READ = """
import hashlib, os, sys
from itertools import chain
from pathlib import Path
import torch
from src.data.batching import batches
from src.data.kinds.images import ImageLoader
folder, resident, group = sys.argv[1:]
loader = ImageLoader(batch_size=32, flip="random", crop_padding=4, resident=resident)
train = batches(Path(folder), "train", loader, train=True).to(torch.device("cpu"))
iterator = iter(train)
first = next(iterator)
file = os.open(Path(folder, "train.safetensors"), os.O_RDONLY)
os.fsync(file)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
if group:
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
digest = hashlib.sha256()
for images, labels in chain([first], iterator):
    digest.update(images.numpy())
    digest.update(labels.numpy())
print(digest.hexdigest())
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose processes have `LIMIT` bytes of memory, the file cache included."""
    folder = GROUPS / f"larger-than-memory-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no memory limit can be set here: {error}")
    yield folder
    folder.rmdir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    images = np.frombuffer(random.bytes(3 * 64 * 64 * IMAGES), np.uint8).reshape(IMAGES, 3, 64, 64)
    arrays: packed.Arrays = {"images": images, "labels": np.arange(IMAGES)}
    meta: dict[str, Any] = {"kind": "images", "shape": [3, 64, 64]}
    write_packed(packed.Packed({"train": arrays}, meta), tmp_path, config={}, source={})
    return tmp_path


def digest_of_an_epoch(folder: Path, resident: str, group: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder), resident, str(group or "")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_a_split_larger_than_memory_has_the_bits_of_one_that_fits(folder: Path, group: Path) -> None:
    expected = digest_of_an_epoch(folder, "yes")
    assert digest_of_an_epoch(folder, "no", group) == expected
    assert int((group / "memory.failcnt").read_text()) > 0  # pages were taken back
    assert int((group / "memory.max_usage_in_bytes").read_text()) <= LIMIT
