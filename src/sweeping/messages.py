"""Messages between a sweep and its workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Sweep to worker: a trial to be trained."""

    number: int
    study: str
    config: Mapping[str, Any]  # resolved, not checked yet
    objectives: tuple[str, ...]
    prunes: bool  # whether each `Validated` waits for a bool: end this trial?
    parent: str  # the journal's id of the study's run in MLflow
    work: Path  # folder of the trial's checkpoints and journal


@dataclass(frozen=True)
class Validated:
    """Worker to sweep: the first objective's metric after `epoch` epochs."""

    epoch: int
    value: float


@dataclass(frozen=True)
class Ended:
    """Worker to sweep: the trial is complete, or was pruned."""

    values: tuple[float, ...]  # one for each objective
    pruned: bool
    seconds: float  # of training


@dataclass(frozen=True)
class Failed:
    """Worker to sweep: the trial failed and would fail again."""

    reason: str  # one line
    ends_sweep: bool = False  # every other trial would fail for the same reason


Message = Validated | Ended | Failed
