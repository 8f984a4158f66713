"""Proves what the README promises on reproducibility: trains again in every way it names, and compares digests.

    python -m verification                    each experiment of params.yaml, small but real steps
    python -m verification imdb_lstm          one of them
    python -m verification --pipeline         and `dvc repro --force` twice

All of it happens in a scratch worktree of what lies here, uncommitted changes included. Exit codes: 0 all claims hold,
1 one does not.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from src.common.errors import Failure
from src.common.files import sha256_of
from src.common.git import environment, git, worktree
from src.common.paths import CONF, ROOT

# Whole networks on the sample's data, a few batches: what is compared are bits, not accuracies.
STEPS = (
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.checkpoint_seconds=0",
    "evaluation.segmenter_epochs=1",
)
TWO = ("trainer=ddp", "trainer.devices=2")
KILLS = 3
WAIT_S = 300.0


@dataclass(frozen=True)
class Claim:
    """One line of the table; `holds` is None where there is nothing to hold."""

    experiment: str
    text: str
    holds: bool | None
    detail: str


def compared(
    experiment: str, text: str, found: Mapping[str, str], wanted: Mapping[str, str], detail: str = ""
) -> Claim:
    """A claim that two sets of digests are the same; what differs is named."""
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return Claim(experiment, text, not differing, f"differs: {', '.join(differing)}" if differing else detail)


class Experiment:
    """One experiment's small runs, in a worktree."""

    def __init__(self, name: str, folder: Path, luck: random.Random) -> None:
        self.name = name
        self.folder = folder
        self.luck = luck
        # One folder for all runs: the model card names the folder that its commands are for.
        self.place = f"hydra.run.dir=experiments/verified/{name}"

    def claims(self) -> Iterator[Claim]:
        """Runs and compares; a claim as soon as it is decided."""
        folder = self.run()
        bits, outputs = self.bits(folder), self.outputs(folder)
        same = functools.partial(compared, self.name)
        shutil.rmtree(folder)
        self.run()
        weights = f"weights {bits['weights'][:8]}, optimizer {bits['optimizer'][:8]}"
        yield same("trained twice from scratch", self.bits(folder), bits, weights)
        again = self.outputs(folder)
        yield same("all that DVC hashes, twice", again, outputs, f"{len(outputs)} files of train, evaluate, export")
        for text, interrupted in (
            (f"SIGKILL in mid-epoch, {KILLS} times", self.killed_anywhere),
            ("SIGKILL while an epoch's checkpoint is written", self.killed_at_an_epochs_end),
            ("SIGTERM, then Ctrl-C", self.told_to_end),
        ):
            folder, detail = interrupted()
            yield same(text, self.bits(folder), bits, detail)
        yield Claim(self.name, "0 and 2 loader workers", None, "no workers: batches are made in the process")
        yield same("one process, and DDP with one", self.bits(self.run("trainer.strategy=ddp")), bits)
        pair = self.bits(self.run(*TWO))
        yield same("DDP with two, twice", self.bits(self.run(*TWO)), pair)
        folder, detail = self.killed_anywhere(*TWO)
        yield same(f"DDP with two, SIGKILL {KILLS} times", self.bits(folder), pair, detail)

    def run(self, *words: str) -> Path:
        """A run to its end; its folder."""
        return self.finish(self.start(*words))

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "src.train", f"+experiment={self.name}", *STEPS, self.place, *words],
            cwd=self.folder,
            env=environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # killed with all its processes
        )

    def finish(self, process: subprocess.Popen[str]) -> Path:
        said, _ = process.communicate(timeout=WAIT_S)
        found = re.search(r"^trained in [\d.]+ s: (\S+)/train$", said, re.MULTILINE)
        if process.returncode or not found:
            raise Failure(f"a run of {self.name} ended with {process.returncode}:\n{said[-2000:]}")
        return self.folder / found[1]

    def killed_anywhere(self, *words: str) -> tuple[Path, str]:
        """SIGKILL after a random number of the first epochs' checkpoints, again and again."""
        places = []
        for _ in range(KILLS):
            process = self.start(*words)
            for _ in range(self.luck.randint(1, 4)):
                self.await_checkpoint(process)
            time.sleep(self.luck.uniform(0, 0.05))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            places.append(self.where())
        return self.run(*words), f"stood at {', '.join(places)}"

    def killed_at_an_epochs_end(self) -> tuple[Path, str]:
        """SIGKILL as soon as the epoch's line is printed: its checkpoint is written right after."""
        process = self.start()
        self.await_line(process, r"^epoch 1/")
        process.kill()
        process.communicate()
        place = self.where()
        return self.run(), f"stood at {place}"

    def told_to_end(self) -> tuple[Path, str]:
        codes = []
        for number in (signal.SIGTERM, signal.SIGINT):
            process = self.start()
            self.await_checkpoint(process)
            process.send_signal(number)
            process.communicate(timeout=WAIT_S)
            codes.append(process.returncode)
        if codes != [143, 130]:
            raise Failure(f"{self.name} ended with {codes} on SIGTERM and Ctrl-C, not with 143 and 130")
        return self.run(), "exit codes 143, 130"

    def await_line(self, process: subprocess.Popen[str], pattern: str) -> None:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if re.search(pattern, line):
                return
        raise Failure(f"a run of {self.name} ended too soon:\n{''.join(said)[-2000:]}")

    def await_checkpoint(self, process: subprocess.Popen[str]) -> None:
        """Until one more checkpoint is there."""
        before, end = self.saved(), time.monotonic() + WAIT_S
        while self.saved() == before:
            if process.poll() is not None or time.monotonic() > end:
                raise Failure(f"a run of {self.name} ended too soon:\n{process.communicate()[0][-2000:]}")
            time.sleep(0.002)

    def saved(self) -> set[tuple[str, int]]:
        found = set()
        for path in self.folder.glob("experiments/.work/*/last.ckpt"):
            found.add((str(path), path.stat().st_mtime_ns))
        return found

    def where(self) -> str:
        """How far the unfinished run's checkpoint is."""
        import torch

        (path,) = self.folder.glob("experiments/.work/*/last.ckpt")
        state = torch.load(path, weights_only=True)["PackedData"]
        return f"epoch {state['epoch'] + 1} batch {state['consumed']}"

    def bits(self, folder: Path) -> dict[str, str]:
        note = json.loads((folder / "train" / "model.json").read_text())
        return {"weights": note["sha256"], "optimizer": note["optimizer_sha256"]}

    def outputs(self, folder: Path) -> dict[str, str]:
        """The sha256 of each file that DVC would hash of this run."""
        for stage in ("evaluate", "export"):
            command = [
                sys.executable,
                "-m",
                f"src.{stage}",
                "-cp",
                f"../{folder.relative_to(self.folder)}",
                "-cn",
                "config",
            ]
            subprocess.run(command, cwd=self.folder, env=environment(self.folder), check=True, capture_output=True)
        made = [folder / name for name in _outputs()]
        files = [path for out in made for path in (sorted(out.rglob("*")) if out.is_dir() else [out]) if path.is_file()]
        return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _outputs() -> list[str]:
    """What train, evaluate and export hand to DVC, relative to the experiment's folder."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    names = []
    for stage in ("train", "evaluate", "export"):
        for kind in ("outs", "metrics", "plots"):
            for out in stages[stage]["do"].get(kind, ()):
                names.append((out if isinstance(out, str) else next(iter(out))).removeprefix("experiments/${key}/"))
    return names


def pipeline(folder: Path) -> Claim:
    """`dvc repro --force` twice: the second leaves dvc.lock as the first wrote it."""
    locks = []
    for _ in range(2):
        command = [sys.executable, "-m", "dvc", "repro", "--force"]
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"dvc repro failed:\n{(done.stdout + done.stderr)[-2000:]}")
        locks.append((folder / "dvc.lock").read_text())
    changed = "another than" if git("diff", "--stat", "dvc.lock", cwd=folder) else "the same as"
    return Claim("all", "`dvc repro --force` twice", locks[0] == locks[1], f"dvc.lock is {changed} the committed one")


def verify(names: list[str], with_pipeline: bool, say: Callable[[Claim], None]) -> bool:
    """Whether every claim holds."""
    from src.tracking.provenance import dirty_patch

    held = True
    with worktree("HEAD", dirty_patch()) as folder:
        if with_pipeline:
            claim = pipeline(folder)
            say(claim)
            held &= claim.holds is not False
        for name in names:
            for claim in Experiment(name, folder, random.Random()).claims():
                say(claim)
                held &= claim.holds is not False
    return held


def _print(claim: Claim) -> None:
    verdict = {True: "holds", False: "BROKEN", None: "-"}[claim.holds]
    print(f"{claim.experiment:18} {claim.text:48} {verdict:7} {claim.detail}", flush=True)


def main() -> None:
    """The command."""
    known = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        prog="python -m verification", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        choices=[*known, []],
        metavar="NAME",
        help=f"of {', '.join(known)}; none: those in params.yaml",
    )
    parser.add_argument("--pipeline", action="store_true", help="also `dvc repro --force` twice, ten minutes")
    arguments = parser.parse_args()
    try:
        names = arguments.experiments or list(yaml.safe_load((ROOT / "params.yaml").read_text())["experiments"])
        held = verify(names, arguments.pipeline, _print)
    except Failure as error:
        print(f"verify failed: {error}", file=sys.stderr)
        sys.exit(1)
    print("all claims hold" if held else "a claim does not hold")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
