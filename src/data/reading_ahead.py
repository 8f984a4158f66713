"""Rows of a memory-mapped split, read on a thread while the batches before them are computed on.

The kernel reads a mapped file on access: a training that indexes into a split larger than memory would wait for the
disk at each example. The order of an epoch is known, so the rows of the next batches are read before they are needed.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from src.common.ordered import in_order

SMALL = 64  # bytes of a row, below which one read of the kernel's serves thousands of rows
DEPTH = 2  # batches whose rows are read before they are needed

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`make(item)` for each item, in order, computed on a thread up to `DEPTH` items in advance.

    The thread ends with the iterator, whether it is exhausted or closed. Its exceptions are raised here, at their item.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        yield from in_order(lambda item: pool.submit(make, item), items, DEPTH)


def fetch(array: Tensor, indices: Tensor) -> None:
    """Reads rows of a mapped array [N, ...], int64 indices [B], so that access to them does not wait for the disk.

    All reads are queued before the first is waited for. Rows of a few numbers, such as labels, are left to the kernel,
    which reads many at once.
    """
    if array[:1].nbytes < SMALL:
        return
    will_need(array, indices)
    pages = array.numpy().reshape(len(array), -1).view(np.uint8)[:, :: mmap.PAGESIZE]
    for index in indices.tolist():
        pages[index].max()  # maps the pages into this process, which waits for those that are still on their way


def gather(array: Tensor, indices: Tensor) -> Tensor:
    """Rows of a mapped array [N, ...] by int64 indices [B], copied into page-locked memory: [B, ...]."""
    will_need(array, indices)
    rows = torch.empty((len(indices), *array.shape[1:]), dtype=array.dtype, pin_memory=torch.cuda.is_available())
    np.take(array.numpy(), indices.numpy(), axis=0, out=rows.numpy(), mode="clip")  # "raise" would copy twice
    return rows


def will_need(array: Tensor, indices: Tensor) -> None:
    """Has the kernel start reading these rows of a mapped array, without waiting; has no effect without `madvise`."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    size = array[:1].nbytes
    if advise is None or size < mmap.PAGESIZE:  # the kernel reads whole pages, and their neighbours, in any case
        return
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start in (array.data_ptr() + indices * size).tolist():
        page = start - start % mmap.PAGESIZE
        advise(page, start + size - page, mmap.MADV_WILLNEED)


def transferred(parts: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Each part on a GPU, copied from page-locked memory while the part before it is computed on."""
    copying = torch.cuda.Stream(device)
    before: tuple[dict[str, Tensor], torch.cuda.Event] | None = None
    for part in parts:
        with torch.cuda.stream(copying):
            copies = {key: value.to(device, non_blocking=True) for key, value in part.items()}
        after = copies, copying.record_event()
        if before is not None:
            yield _arrived(*before)
        before = after
    if before is not None:
        yield _arrived(*before)


def _arrived(copies: dict[str, Tensor], event: torch.cuda.Event) -> dict[str, Tensor]:
    """The copies, for which the current stream waits."""
    stream = torch.cuda.current_stream(event.device)
    stream.wait_event(event)
    for copy in copies.values():
        copy.record_stream(stream)  # or their memory would be reused by a copy that does not wait for this stream
    return copies
