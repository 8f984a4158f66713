"""What a training run in MLflow says of itself: parameters, tags, description."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.credentials import masked
from src.common.hardware import describe_device
from src.common.identity import data_digest
from src.common.paths import ROOT
from src.configuration.fingerprints import stage_code
from src.configuration.schema import Config
from src.tracking.provenance import UNKNOWN, environment
from src.tracking.tracker import DATA_TAG


def run_tags(config: Config, meta: Mapping[str, Any], *, fingerprint: str, threads: int) -> dict[str, str]:
    """The tags of a run; `fingerprint`: of all that its bits depend on; `threads`: torch's."""
    environment = _environment(describe_device(config.trainer.accelerator), threads)
    commit = {} if environment["git.commit"] == UNKNOWN else {"mlflow.source.git.commit": environment["git.commit"]}
    # MLflow's own tags, which its column Source shows, come after the user's, which they replace.
    return (
        {key: str(value) for key, value in config.tags.items()}
        | environment
        | commit
        | {
            "mlflow.source.name": _entry_point(),
            "mlflow.source.type": "LOCAL",
            "pipeline.profile": config.profile.name,
            "pipeline.fingerprint": fingerprint,
            "pipeline.code": stage_code("train", config).fingerprint,
            **{DATA_TAG + split: facts["sha256"] for split, facts in meta["splits"].items()},
            "pipeline.output": config.output,
        }
    )


def run_parameters(config: Config) -> dict[str, Any]:
    """The parameters of a run: all that its results depend on."""
    return config.settings()


def run_datasets(config: Config, meta: Mapping[str, Any], *splits: str) -> list[dict[str, str]]:
    """The splits that a run uses, as MLflow describes a data set, whose digest has at most 36 characters."""
    folder = os.path.relpath(config.processed, ROOT)
    return [
        {
            "name": config.data.name,
            "digest": meta["splits"][split]["sha256"][:16],
            "source_type": "local",
            "source": json.dumps({"uri": f"{folder}/{split}.safetensors"}),
            "profile": json.dumps(
                {
                    "num_rows": meta["splits"][split]["examples"],
                    "split": split,
                    "profile": config.profile.name,
                    "sha256": meta["splits"][split]["sha256"],
                    "archive": masked(str(meta["source"]["origin"])),
                    "archive_sha256": meta["source"]["sha256"],
                }
            ),
            "context": split,
        }
        for split in splits
    ]


def data_report(config: Config, meta: Mapping[str, Any]) -> Path | None:
    """The page of the data report of these very splits: DVC's, or that of `python -m src.describe`; None: neither."""
    for folder in (config.report, config.direct_report):
        try:
            digest = json.loads((folder / "metrics.json").read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if digest == data_digest(meta) and (folder / "report.html").is_file():
            return folder / "report.html"
    return None


def _entry_point() -> str:
    """The command's file, relative to the repository."""
    path = Path(sys.argv[0]).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def run_description(config: Config) -> str:
    """The description of a run on its page."""
    return f"{config.description} ({config.profile.note})"


@functools.cache
def _environment(device: str, threads: int) -> dict[str, str]:
    """The provenance of this process, read once: several runs of one process share its code."""
    return environment(device=device, threads=threads)
