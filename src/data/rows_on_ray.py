"""Decodes rows of images on a Ray cluster whose nodes see the archive and the packed folder under the same paths."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.common.errors import Failure
from src.common.paths import ROOT
from src.common.ray_cluster import connect
from src.configuration.schema import PackingRay
from src.data.image_rows import ImageRows, Summary, write_rows

SHARD_BYTES = 256 << 20  # of pixels that one task decodes: half a minute of one core


def write_rows_on_ray(
    rows: ImageRows, path: Path, offsets: Mapping[int, int], config: PackingRay
) -> Iterator[tuple[int, int, Summary]]:
    """As `image_rows.write_rows`, in tasks of a Ray cluster. A task whose node is lost is started again on another one.

    Raises:
        Failure: Ray is not installed, there is no cluster, or its nodes can't run the tasks.
        SourceError: the archive is damaged.
    """
    ray = connect("data.ray", {"PYTHONPATH": str(ROOT)})
    try:
        decode = ray.remote(num_cpus=config.cpus, max_retries=-1)(_decode_shard)
        length = max(1, SHARD_BYTES // rows.row_bytes)
        pending: deque[tuple[int, int, Any]] = deque()
        for start in range(0, len(rows), length):
            stop = min(start + length, len(rows))
            shard = replace(rows, names=rows.names[start * rows.files_per_row : stop * rows.files_per_row])
            places = {part: offset + start * rows.part_bytes for part, offset in offsets.items()}
            pending.append((start, stop, decode.remote(shard, path, places, config.cpus)))
            if len(pending) > config.processes:
                start, stop, task = pending.popleft()
                yield start, stop, ray.get(task)
        for start, stop, task in pending:
            yield start, stop, ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        message = str(error).strip().splitlines()[-1][:200]
        raise Failure(f"data.ray: a node can't decode images ({message}); it needs {ROOT} and {path.parent}") from None
    finally:
        ray.shutdown()


def _decode_shard(rows: ImageRows, path: Path, offsets: Mapping[int, int], threads: int) -> Summary:
    """Runs on a node of the cluster."""
    summary = Summary()
    for _, _, part in write_rows(rows, path, offsets, threads):
        summary.add(part)
    return summary
