"""How this process was started: alone, or by torchrun or SLURM's srun as one of several that train one model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from src.common.errors import ConfigError
from src.configuration.schema import Trainer

PEER_TIMEOUT_S = 10.0  # for a process to notice by itself that another one is gone
# Of the rendezvous of SLURM's steps, by their numbers; below the ports that systems hand out by themselves. Lightning's
# SLURMEnvironment derives its port from the job alone, so two steps of a job would collide, and takes 4 s to import.
PORTS = range(15_000, 25_000)


@dataclass(frozen=True)
class Launch:
    """One of several processes, as its launcher numbered it."""

    launcher: str
    rank: int
    world_size: int  # processes on all nodes
    local_rank: int  # among those of this node
    per_node: int
    rendezvous: str  # as torch.distributed's init_method


def read_launch() -> Launch | None:
    """The launch that the environment describes; None for a process that was started alone.

    torchrun and compatible launchers set RANK and WORLD_SIZE. Within a job of SLURM's only the steps that srun starts
    have SLURM_STEP_NODELIST: the batch script itself, whose SLURM_NTASKS is the job's, is alone.
    """
    variables = os.environ
    if "RANK" in variables and "WORLD_SIZE" in variables:
        launch = Launch(
            launcher="torchrun",
            rank=int(variables["RANK"]),
            world_size=int(variables["WORLD_SIZE"]),
            local_rank=int(variables.get("LOCAL_RANK", 0)),
            per_node=int(variables.get("LOCAL_WORLD_SIZE", 1)),
            rendezvous="env://",
        )
    elif "SLURM_PROCID" in variables and "SLURM_STEP_NODELIST" in variables:
        world_size = int(variables["SLURM_NTASKS"])
        nodes = int(variables.get("SLURM_STEP_NUM_NODES") or variables.get("SLURM_NNODES") or 1)
        launch = Launch(
            launcher="srun",
            rank=int(variables["SLURM_PROCID"]),
            world_size=world_size,
            local_rank=int(variables["SLURM_LOCALID"]),
            per_node=int(variables.get("SLURM_NTASKS_PER_NODE") or world_size // nodes),
            rendezvous=_slurm_rendezvous(),
        )
    else:
        return None
    return launch if launch.world_size > 1 else None


def check_processes(trainer: Trainer) -> None:
    """Checks that the launcher started as many processes as the configuration, which a run records, asks for.

    Raises:
        ConfigError: the numbers differ, or no launcher started the processes of the other nodes.
    """
    launch = read_launch()
    configured = f"trainer.devices: {trainer.devices} a node, with trainer.num_nodes={trainer.num_nodes},"
    if launch is None:
        if trainer.num_nodes > 1:
            raise ConfigError(f"{configured} but this process was started alone: start all by torchrun or srun")
    elif (trainer.processes, trainer.devices) != (launch.world_size, launch.per_node):
        remedy = f"trainer.devices={launch.per_node} trainer.num_nodes={launch.world_size // launch.per_node}"
        raise ConfigError(
            f"{configured} but {launch.launcher} started {launch.world_size} processes, {launch.per_node} a node: "
            f"say trainer=ddp {remedy}, or start as many as the configuration says"
        )


def _slurm_rendezvous() -> str:
    """The rendezvous of a step: its first node, at a port that other steps and jobs do not use."""
    variables = os.environ
    hosts = re.sub(r"\[([^],-]+)[^]]*]", r"\1", variables["SLURM_STEP_NODELIST"])  # gpu[07-08,11],cpu1: gpu07,cpu1
    host = variables.get("MASTER_ADDR") or hosts.partition(",")[0]
    step = int(variables.get("SLURM_JOB_ID", 0)) + 1000 * int(variables.get("SLURM_STEP_ID", 0))
    return f"tcp://{host}:{variables.get('MASTER_PORT') or PORTS[step % len(PORTS)]}"
