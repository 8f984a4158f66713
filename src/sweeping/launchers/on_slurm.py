"""Workers as jobs of SLURM, written and submitted by submitit; or of its local executor, which needs no cluster."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

from src.common.errors import Failure
from src.common.paths import ROOT
from src.sweeping.launchers import imported
from src.sweeping.launchers.home import last_line
from src.sweeping.space import SweepConfig

# Of a job; one that is out of time saves its trial, which goes on in another. submitit's own default is 5.
MINUTES = 240


class Jobs:
    """What submits a job for each worker. Its logs lie in the folder `jobs`, named by the job's number."""

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        submitit: Any = imported("submitit")
        sweep, wanted = config.sweep, config.sweep.resources
        self.host = "127.0.0.1" if sweep.cluster == "local" else socket.gethostname()
        try:
            self._executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=sweep.cluster)
            self._executor.update_parameters(
                name=f"sweep-{config.study}",
                cpus_per_task=wanted.cpus,
                gpus_per_node=wanted.gpus,
                mem_gb=wanted.memory_gb,
                timeout_min=MINUTES,
                **{f"slurm_{key}": value for key, value in sweep.slurm.items()},
            )
        except (RuntimeError, NameError) as error:
            said = str(error).splitlines()[0]
            raise Failure(f"sweep.cluster={sweep.cluster}, sweep.slurm: submitit refuses: {said}") from None

    def start(self, command: list[str]) -> Any:
        try:
            return self._executor.submit(subprocess.run, command, cwd=str(ROOT), check=True)
        except Exception as error:  # submitit's FailedJobError, with what sbatch said
            raise Failure(f"a SLURM job can't be submitted: {last_line(str(error))}") from None

    def ended(self, job: Any) -> str | None:
        if not job.done():
            return None
        said = last_line(job.stderr() or "") or f"the job's state is {job.state}"
        return f"{said}, see {job.paths.stderr}"

    def cancel(self, job: Any) -> None:
        job.cancel(check=False)

    def close(self) -> None:
        """Jobs whose workers have called end with them."""
