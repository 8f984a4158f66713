"""A small training of one experiment in a scratch worktree: run, interrupted, resumed, and described by digests."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from src.common.clock_metrics import EPOCH_SECONDS
from src.common.errors import Failure
from src.common.git import worktree_environment
from src.common.paths import ROOT
from src.common.run_folder import RunFolder
from verification.interruption import TIMEOUT_S, checkpoints, digests, wait_for_checkpoint, wait_until

# The networks at their full size on the sample's data, for a few batches: bits are compared, not accuracies.
STEPS = (
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.checkpoint_seconds=0",
)
KILLS = 3


class SmallRun:
    """The small training of one experiment. Interrupting methods start or resume it; `train` takes it to its end."""

    def __init__(self, experiment: str, worktree: Path, rng: random.Random) -> None:
        self.experiment = experiment
        self.worktree = worktree
        self.rng = rng
        # The same folder for all runs: the model card contains it.
        self.output = f"experiments/verified/{experiment}"
        self.folder = worktree / self.output

    def train(self, *overrides: str) -> None:
        """Trains to the end, from the checkpoint if there is one.

        Raises:
            Failure: the training failed; with the end of its output.
        """
        process = self._start(*overrides)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        if process.returncode:
            raise Failure(f"a training of {self.experiment} ended with {process.returncode}:\n{output[-2000:]}")

    def kill_anywhere(self, *overrides: str) -> str:
        """SIGKILL to all processes at a random moment of the first epochs, `KILLS` times; where they happened."""
        positions = []
        for _ in range(KILLS):
            process = self._start(*overrides)
            for _ in range(self.rng.randint(1, 4)):
                wait_for_checkpoint(self.worktree, process)
            time.sleep(self.rng.uniform(0, 0.05))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            positions.append(self._checkpoint_position())
        return f"at {', '.join(positions)}"

    def kill_at_epoch_end(self) -> str:
        """SIGKILL as soon as an epoch is in the journal: its checkpoint is written right after; where it happened."""
        process = self._start()
        wait_until(self._has_epoch, process)
        process.kill()
        process.communicate()
        return f"at {self._checkpoint_position()}"

    def terminate(self) -> str:
        """SIGTERM after the first checkpoint, then Ctrl-C after the next one; the exit codes.

        Raises:
            Failure: the exit codes are not those of the signals.
        """
        codes = []
        for number in (signal.SIGTERM, signal.SIGINT):
            process = self._start()
            wait_for_checkpoint(self.worktree, process)
            process.send_signal(number)
            process.communicate(timeout=TIMEOUT_S)
            codes.append(process.returncode)
        if codes != [143, 130]:
            raise Failure(f"{self.experiment} ended with {codes} on SIGTERM and Ctrl-C, not with [143, 130]")
        return "exit codes 143, 130"

    def bits(self) -> dict[str, str]:
        """The sha256 of the weights and of the optimizers' last state."""
        note = json.loads(RunFolder(self.folder).model_note.read_text())
        return {"weights": note["sha256"], "optimizer": note["optimizer_sha256"]}

    def outputs(self) -> dict[str, str]:
        """Evaluates and exports; the sha256 of each file of the run that DVC would hash.

        Raises:
            Failure: a stage failed; with the end of its output.
        """
        for stage in ("evaluate", "export"):
            words = (f"src.{stage}", "-cp", f"../{self.output}", "-cn", "config")
            done = subprocess.run(
                [sys.executable, "-m", *words],
                cwd=self.worktree,
                env=worktree_environment(self.worktree),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise Failure(f"{stage} of {self.experiment} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        names = stage_outputs()
        return {path: sha256 for path, sha256 in digests(self.folder).items() if path.startswith(names)}

    def _start(self, *overrides: str) -> subprocess.Popen[str]:
        """Starts the training, in a process group of its own, without the outputs of an earlier one."""
        shutil.rmtree(self.folder, ignore_errors=True)
        words = (f"+experiment={self.experiment}", *STEPS, f"hydra.run.dir={self.output}", *overrides)
        return subprocess.Popen(
            [sys.executable, "-m", "src.train", *words],
            cwd=self.worktree,
            env=worktree_environment(self.worktree),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _has_epoch(self) -> bool:
        """Whether the journal of an unfinished run holds a complete epoch; that of a finished one has no checkpoint."""
        journals = [checkpoint.with_name("tracking.jsonl") for checkpoint, _ in checkpoints(self.worktree)]
        return any(f'"{EPOCH_SECONDS}"'.encode() in journal.read_bytes() for journal in journals)

    def _checkpoint_position(self) -> str:
        """The position of the unfinished run's checkpoint."""
        import torch

        ((path, _),) = checkpoints(self.worktree)
        state = torch.load(path, weights_only=True)["PackedData"]
        return f"epoch {state['epoch'] + 1} batch {state['consumed']}"


def stage_outputs() -> tuple[str, ...]:
    """The files and folders that dvc.yaml hashes of train, evaluate and export, relative to the run's folder."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for stage in ("train", "evaluate", "export")
        for kind in ("outs", "metrics", "plots")
        for out in stages[stage]["do"].get(kind, ())
    ]
    return tuple(out.removeprefix("experiments/${key}/") for out in outs)
