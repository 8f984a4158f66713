"""Makes a recorded run again, from what it recorded, and says whether it came out the same.

    python -m src.reproduce RUN_ID

The run's commit is checked out in a scratch worktree, with what was not committed then as a patch on it; the run is
trained there from its own configuration, then evaluated and exported if it was. Nothing here is changed. Exit codes:
0 the same to the bit, 1 not the same, 2 refused.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.common.errors import Failure
from src.common.files import sha256_of
from src.common.paths import ROOT
from src.configuration.composing import write_resolved
from src.tracking.store import QUIET_AND_BOUNDED

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

OUTPUT = "experiments/reproduced"
CLOCK = re.compile("_seconds$|_ms_")  # metrics of such names are of the clock
MACHINE = ("cpu", "cpu.isa", "torch", "torchvision", "pytorch-lightning", "python", "cuda")


def reproduce(run_id: str) -> bool:
    """Prints a table, recorded beside made again, metric by metric and digest by digest; whether all are the same.

    Raises:
        Failure: the run is not known or did not end, or its commit, its data or its packages are not here.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from src.common.git import environment, worktree
    from src.tracking.tracker import CONFIG, DEFAULT_STORE, PATCH, resolve_store

    client = MlflowClient(resolve_store(None, DEFAULT_STORE))
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise Failure(f"{run_id}: {error.message}; the run's page in `make ui` shows its id") from None
    config = yaml.safe_load(_artifact(client, run_id, CONFIG) or "")
    patch = _artifact(client, run_id, PATCH) or ""
    _refuse(run, config, patch)
    _say_what_differs(run.data.tags)

    with worktree(run.data.tags["git.commit"], patch) as folder:
        processed = Path(config["data_folder"], "processed", config["profile"]["name"], config["data"]["name"])
        (folder / processed).parent.mkdir(parents=True, exist_ok=True)
        (folder / processed).symlink_to(ROOT / processed)
        trainer = config["trainer"] | {"threads": int(run.data.tags["threads"])}  # the bits depend on it
        write_resolved(folder / OUTPUT / CONFIG, config | {"output": OUTPUT, "trainer": trainer})
        done = {"evaluate": "test_", "export": "onnx_"}  # by the metrics that a stage leaves
        stages = [stage for stage, prefix in done.items() if any(name.startswith(prefix) for name in run.data.metrics)]
        for stage in ("train", *stages):
            command = [sys.executable, "-m", f"src.{stage}", "-cp", f"../{OUTPUT}", "-cn", "config"]
            if subprocess.run(command, cwd=folder, env=environment(folder)).returncode:
                raise Failure(f"{stage} failed, see above")
        again = MlflowClient(environment(folder)["MLFLOW_TRACKING_URI"])
        experiment = again.get_experiment_by_name(config["name"])
        (made,) = again.search_runs([experiment.experiment_id]) if experiment else (None,)
        if made is None:
            raise Failure("the run that was made again left nothing in its MLflow store")
        return _compare(_facts(client, run), _facts(again, made))


def _artifact(client: MlflowClient, run_id: str, name: str) -> str | None:
    """A recorded text; None if the run has none."""
    if name not in {artifact.path for artifact in client.list_artifacts(run_id)}:
        return None
    return Path(client.download_artifacts(run_id, name)).read_text()


def _refuse(run: Run, config: Any, patch: str) -> None:
    """Raises Failure where the run can't come out the same, or can't be made at all; with all the reasons."""
    from src.tracking.provenance import LEFT_OUT
    from src.tracking.tracker import DATA_TAG, MODEL_TAG

    tags = run.data.tags
    if not config or MODEL_TAG not in tags:
        raise Failure(
            f"{run.info.run_id} is {run.info.status} and recorded no trained model: only whole runs are made again"
        )
    reasons = []
    if tags.get("git.commit", "unknown") == "unknown":
        reasons.append("code: the run was not started from a git repository")
    elif subprocess.run(["git", "cat-file", "-e", tags["git.commit"]], cwd=ROOT, capture_output=True).returncode:
        reasons.append(f"code: the commit {tags['git.commit'][:12]} is not in this repository: git fetch --all")
    if left_out := [line for line in patch.splitlines() if line.startswith(LEFT_OUT)]:
        reasons.append(
            f"code: files of the run were too large to record: {', '.join(line[len(LEFT_OUT) :] for line in left_out)}"
        )
    if tags.get("lock.sha256") != (here := sha256_of(ROOT / "requirements.lock")):
        reasons.append(
            f"packages: requirements.lock had sha256 {str(tags.get('lock.sha256'))[:12]}, has {here[:12]}: "
            f"git checkout {tags.get('git.commit', 'COMMIT')[:12]} -- requirements.lock && make setup"
        )
    folder = ROOT / config["data_folder"] / "processed" / config["profile"]["name"] / config["data"]["name"]
    for tag, recorded in sorted(tags.items()):
        if tag.startswith(DATA_TAG):
            path = folder / f"{tag[len(DATA_TAG) :]}.safetensors"
            if not path.is_file():
                reasons.append(
                    f"data: {path.relative_to(ROOT)} is not there: dvc pull, or dvc repro, or the run's command"
                )
            elif (found := sha256_of(path)) != recorded:
                reasons.append(
                    f"data: {path.relative_to(ROOT)} had sha256 {recorded[:12]}, has {found[:12]}: "
                    f"dvc checkout, or delete {folder.relative_to(ROOT)} and run dvc repro or the run's command"
                )
    if reasons:
        raise Failure("\n  ".join([f"{run.info.run_id} can't be made again here:", *reasons]))


def _say_what_differs(tags: Mapping[str, str]) -> None:
    """Names what of the machine is not as it was: the last bits may differ for it."""
    from src.tracking.provenance import environment

    here = environment()
    for key in MACHINE:
        if key in tags and here.get(key) != tags[key]:
            print(f"note: {key} was {tags[key]}, is {here.get(key)}: the last bits may differ", flush=True)


def _facts(client: MlflowClient, run: Run) -> dict[str, Any]:
    """All that must come out the same: digests, and every point of every metric that is not of the clock."""
    from src.tracking.tracker import MODEL_TAG, STATE_TAG

    facts: dict[str, Any] = {
        name: run.data.tags[tag]
        for name, tag in (("weights (sha256)", MODEL_TAG), ("optimizer state (sha256)", STATE_TAG))
        if tag in run.data.tags
    }
    for name in sorted(run.data.metrics):
        if not CLOCK.search(name):
            points = client.get_metric_history(run.info.run_id, name)
            facts[name] = [value for _, value in sorted({(point.step, repr(point.value)) for point in points})]
    return facts


def _compare(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
    names = [*recorded, *(name for name in again if name not in recorded)]
    differing = 0
    print(f"\n{'':34} {'recorded':>20} {'again':>20}")
    for name in names:
        old, new = recorded.get(name), again.get(name)
        same = old == new
        differing += not same
        print(f"{name:34} {_short(old):>20} {_short(new):>20}  {'same' if same else 'DIFFERS'}")
    print(f"\n{len(names) - differing} of {len(names)} are the same to the bit")
    return not differing


def _short(fact: Any) -> str:
    """A digest's head; a metric's last value and the number of its points."""
    if fact is None:
        return "-"
    if isinstance(fact, str):
        return fact[:12]
    return f"{float(fact[-1]):.6g}" + (f" ({len(fact)} points)" if len(fact) > 1 else "")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m src.reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_id", help="of an MLflow run, as its page shows it")
    for name, value in QUIET_AND_BOUNDED.items():
        os.environ.setdefault(name, value)
    try:
        sys.exit(0 if reproduce(parser.parse_args().run_id) else 1)
    except Failure as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
