"""Who started this process: nobody else, or torchrun or SLURM's srun, as one of several that train one model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from src.common.errors import ConfigError
from src.configuration.schema import Trainer

PATIENCE_S = 10.0  # for a process to notice by itself that another one is gone
PORTS = range(15_000, 25_000)  # of jobs, by their numbers: below those that systems hand out by themselves


@dataclass(frozen=True)
class Launch:
    """One of several processes, as its launcher numbered it."""

    launcher: str
    rank: int
    world: int  # processes on all nodes
    local_rank: int  # among those of this node
    per_node: int
    rendezvous: str  # where they meet, as torch.distributed's init_method


def launch() -> Launch | None:
    """What the environment says; None where this process is alone.

    torchrun, and whatever speaks as it does, sets RANK and WORLD_SIZE. Within a job of SLURM's only the steps that
    srun starts have SLURM_STEP_NODELIST: the batch script itself, whose SLURM_NTASKS is the job's, is alone.
    """
    said = os.environ
    if "RANK" in said and "WORLD_SIZE" in said:
        rank, world = int(said["RANK"]), int(said["WORLD_SIZE"])
        local_rank, per_node = int(said.get("LOCAL_RANK", 0)), int(said.get("LOCAL_WORLD_SIZE", 1))
        found = Launch("torchrun", rank, world, local_rank, per_node, "env://")
    elif "SLURM_PROCID" in said and "SLURM_STEP_NODELIST" in said:
        rank, world = int(said["SLURM_PROCID"]), int(said["SLURM_NTASKS"])
        nodes = int(said.get("SLURM_STEP_NUM_NODES") or said.get("SLURM_NNODES") or 1)
        per_node = int(said.get("SLURM_NTASKS_PER_NODE") or world // nodes)
        found = Launch("srun", rank, world, int(said["SLURM_LOCALID"]), per_node, _of_step())
    else:
        return None
    return found if found.world > 1 else None


def refuse(trainer: Trainer) -> None:
    """Holds the configuration against the launcher: the configuration has the say, since it is what a run records.

    Raises:
        ConfigError: they mean different numbers of processes, or nobody started those on the other nodes.
    """
    found = launch()
    asked = f"trainer.devices: {trainer.devices} a node, with trainer.num_nodes={trainer.num_nodes},"
    if found is None:
        if trainer.num_nodes > 1:
            raise ConfigError(f"{asked} but this process was started alone: start all by torchrun or srun")
    elif (trainer.processes, trainer.devices) != (found.world, found.per_node):
        meant = f"trainer.devices={found.per_node} trainer.num_nodes={found.world // found.per_node}"
        raise ConfigError(
            f"{asked} but {found.launcher} started {found.world} processes, {found.per_node} a node: "
            f"say trainer=ddp {meant}, or start as many as the configuration says"
        )


def _of_step() -> str:
    """Where the processes of a step meet: on its first node, at a port that other steps and jobs don't take."""
    said = os.environ
    hosts = re.sub(r"\[([^],-]+)[^]]*]", r"\1", said["SLURM_STEP_NODELIST"])  # gpu[07-08,11],cpu1: gpu07,cpu1
    host = said.get("MASTER_ADDR") or hosts.partition(",")[0]
    step = int(said.get("SLURM_JOB_ID", 0)) + 1000 * int(said.get("SLURM_STEP_ID", 0))
    return f"tcp://{host}:{said.get('MASTER_PORT') or PORTS[step % len(PORTS)]}"
