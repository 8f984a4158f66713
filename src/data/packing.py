"""From the raw archive to packed splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.configuration.schema import DataConfig
from src.data.writing import write_packed


def pack_splits(config: DataConfig, archive: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Packs a verified archive into the processed folder; returns the meta.

    `source`: the note of where the archive came from.

    Raises:
        SourceError: the archive does not hold what it should.
        PackedError: a split has no example.
    """
    meta = write_packed(
        config.data().pack(archive), config.processed, config=config.packing, source=source, ray=config.data.ray
    )
    counts = ", ".join(f"{split} {facts['examples']}" for split, facts in meta["splits"].items())
    print(f"{config.data.name}: {counts}", flush=True)
    if unused := meta.get("unused"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in unused.items())
        print(f"{config.data.name}: files that are not used: {reasons}", flush=True)
    if bad := meta.get("bad"):
        name, reason = bad[0]
        more = f", and {len(bad) - 1} more (origin.json)" if len(bad) > 1 else ""
        print(f"{config.data.name}: left out: {name} {reason}{more}", flush=True)
    for splits, count in meta["duplicates"].items():
        if count:
            relation = "between" if "/" in splits else "within"
            print(f"{config.data.name}: {count} duplicates {relation} {splits}", flush=True)
    return meta
