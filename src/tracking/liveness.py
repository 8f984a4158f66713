"""Runs whose process died: which process a run belongs to, and an end for those that nobody writes to any more."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from mlflow import MlflowClient

FAILURE_TAG = "pipeline.failure"
HOST_TAG = "pipeline.host"

MACHINE_TAG = "pipeline.machine"

BOOT_TAG = "pipeline.boot_id"

NAMESPACE_TAG = "pipeline.pid_namespace"

PID_TAG = "pipeline.pid"

STARTED_TAG = "pipeline.process_start"

# A process's start time, computed from the boot time, moves when the clock is set; a pid is not reused this soon.
CLOCK_SLACK_S = 60.0


def close_dead_runs(client: MlflowClient) -> None:
    """Set to KILLED the RUNNING runs whose process, on this machine, is certainly dead; leave all others alone."""
    here = process_tags()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    candidates = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{here[HOST_TAG]}'"
    for run in client.search_runs(experiments, candidates):
        if _is_certainly_dead(run.data.tags, here):
            client.set_tag(run.info.run_id, FAILURE_TAG, "the process ended without a word (killed, or power was lost)")
            client.set_terminated(run.info.run_id, "KILLED")


def _is_certainly_dead(tags: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether the process that `tags` describe is gone, as seen from the process that `here` describes."""
    try:
        if (tags[HOST_TAG], tags[MACHINE_TAG]) != (here[HOST_TAG], here[MACHINE_TAG]):
            return False
        if tags[BOOT_TAG] != here[BOOT_TAG]:
            return True
        if tags[NAMESPACE_TAG] != here[NAMESPACE_TAG]:
            return False  # another container's pids mean nothing here
        process = psutil.Process(int(tags[PID_TAG]))
        reused = abs(process.create_time() - float(tags[STARTED_TAG])) > CLOCK_SLACK_S
        return bool(reused or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (KeyError, ValueError, psutil.AccessDenied):
        return False


def process_tags() -> dict[str, str]:
    """Tags that say which process a run belongs to. The machine's id is hashed: it is nobody's business."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {
        HOST_TAG: socket.gethostname(),
        MACHINE_TAG: hashlib.sha256(_read("/etc/machine-id").encode()).hexdigest()[:12],
        BOOT_TAG: _read("/proc/sys/kernel/random/boot_id"),
        NAMESPACE_TAG: namespace,
        PID_TAG: str(os.getpid()),
        STARTED_TAG: f"{psutil.Process().create_time():.2f}",
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
