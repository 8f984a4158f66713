"""What a training run in MLflow says of itself: parameters, tags, description."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from src.configuration.fingerprints import stage_code
from src.configuration.schema import Config
from src.tracking.provenance import environment
from src.tracking.tracker import DATA_TAG


def run_tags(config: Config, meta: Mapping[str, Any], *, fingerprint: str, threads: int) -> dict[str, str]:
    """The tags of a run; `fingerprint`: of all that its bits depend on; `threads`: torch's."""
    return _environment(config.trainer.accelerator, threads) | {
        "pipeline.profile": config.profile.name,
        "pipeline.fingerprint": fingerprint,
        "pipeline.code": stage_code("train", config).fingerprint,
        **{DATA_TAG + split: facts["sha256"] for split, facts in meta["splits"].items()},
        "pipeline.output": config.output,
    }


def run_parameters(config: Config) -> dict[str, Any]:
    """The parameters of a run: all but the output folder, by which any two runs would differ."""
    return {key: value for key, value in config.record().items() if key != "output"}


def run_description(config: Config) -> str:
    """The description of a run on its page."""
    return f"{config.description} ({config.profile.note})"


@functools.cache
def _environment(device: str, threads: int) -> dict[str, str]:
    """The provenance of this process, read once: several runs of one process share its code."""
    return environment(device=device, threads=threads)
