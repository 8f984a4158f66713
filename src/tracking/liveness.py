"""Finds runs whose process died: which process a run belongs to, and a final status for orphaned runs."""

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
    """Sets the RUNNING runs whose process, on this machine, is certainly dead to KILLED; others stay as they are."""
    own_tags = process_tags()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    candidates = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{own_tags[HOST_TAG]}'"
    for run in client.search_runs(experiments, candidates):
        if is_certainly_dead(run.data.tags, own_tags):
            client.set_tag(run.info.run_id, FAILURE_TAG, "the process ended without a word (killed, or power was lost)")
            client.set_terminated(run.info.run_id, "KILLED")


def is_certainly_dead(tags: Mapping[str, str], own_tags: Mapping[str, str]) -> bool:
    """Whether the process of `tags` has ended, as far as this process, of `own_tags`, can see."""
    try:
        if (tags[HOST_TAG], tags[MACHINE_TAG]) != (own_tags[HOST_TAG], own_tags[MACHINE_TAG]):
            return False
        if tags[BOOT_TAG] != own_tags[BOOT_TAG]:
            return True
        if tags[NAMESPACE_TAG] != own_tags[NAMESPACE_TAG]:
            return False  # another container's pids mean nothing here
        process = psutil.Process(int(tags[PID_TAG]))
        is_reused = abs(process.create_time() - float(tags[STARTED_TAG])) > CLOCK_SLACK_S
        return bool(is_reused or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (KeyError, ValueError, psutil.AccessDenied):
        return False


def process_tags() -> dict[str, str]:
    """Tags that identify the process of a run. The machine's id is confidential (machine-id(5)), so it is hashed."""
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
