"""Reproduces a recorded run from its MLflow id, and compares every digest and every metric.

    python -m src.reproduce RUN_ID

The run's commit is checked out in a scratch worktree, with the recorded patch of uncommitted changes. The run is
trained there with its own configuration, then evaluated and exported if it was. This repository and its
store stay unchanged. Exit codes: 0 the same to the bit, 1 not the same, 2 refused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.clock_metrics import is_clock_metric
from src.common.errors import ConfigError, Failure
from src.common.files import sha256_of
from src.common.git import git, worktree, worktree_environment
from src.common.hardware import describe_device
from src.common.paths import ROOT
from src.common.run_folder import RunFolder
from src.common.yaml_files import parse_yaml
from src.configuration.composing import check, write_resolved
from src.configuration.fingerprints import LOCK, stage_code
from src.tracking.store import QUIET_AND_BOUNDED, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

OUTPUT = "experiments/reproduced"
ARTIFACTS = {"evaluate": "evaluation", "export": "export"}  # the folder that each stage adds to the run in MLflow
# What of the machine may change the last bits, by the names of its tags.
MACHINE = ("cpu", "cpu.isa", "device", "gpu.driver", "torch", "torchvision", "pytorch-lightning", "python", "cuda")


def reproduce(run_id: str) -> bool:
    """Repeats a run and prints a table of recorded and reproduced values; whether all are the same.

    Raises:
        Failure: the run is unknown or incomplete, its commit, data or packages are not available, or a stage failed.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from src.tracking.tracker import CONFIG, DEFAULT_STORE, PATCH, resolve_store

    client = connect(resolve_store(None, DEFAULT_STORE))
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise Failure(f"{run_id}: {error.message}; the run's page in `make ui` shows its id") from None
    tags = run.data.tags
    artifacts = {artifact.path for artifact in client.list_artifacts(run_id)}
    config_text, patch = (
        Path(client.download_artifacts(run_id, name)).read_text() if name in artifacts else ""
        for name in (CONFIG, PATCH)
    )
    config = parse_yaml(config_text, CONFIG)
    _refuse(run, config, patch)
    for note in _machine_differences(tags):
        print(f"note: {note}", flush=True)

    with worktree(tags["git.commit"], patch) as folder:
        print(f"note: {code_difference(config, folder)}", flush=True)
        _link_data(config, folder)
        trainer = config["trainer"] | {"threads": int(tags["threads"])}  # the bits depend on it
        write_resolved(RunFolder(folder / OUTPUT).config, config | {"output": OUTPUT, "trainer": trainer})
        environment = worktree_environment(folder)
        for stage in ("train", *(stage for stage, artifact in ARTIFACTS.items() if artifact in artifacts)):
            # The next stage, and the comparison, need all of it in the store: a slow machine sends it late.
            for command in ([stage, "-cp", f"../{OUTPUT}", "-cn", "config"], ["sync"]):
                words = [sys.executable, "-m", f"src.{command[0]}", *command[1:]]
                if subprocess.run(words, cwd=folder, env=environment, check=False).returncode:
                    raise Failure(f"{command[0]} failed, see above")
        reproduced_in = MlflowClient(environment["MLFLOW_TRACKING_URI"])
        experiment = reproduced_in.get_experiment_by_name(config["name"])
        runs = reproduced_in.search_runs([experiment.experiment_id]) if experiment else []
        if not runs:
            raise Failure("the reproduced run left nothing in its MLflow store")
        return _compare(_results(client, run), _results(reproduced_in, runs[0]))


def _refuse(run: Run, config: Mapping[str, Any] | None, patch: str) -> None:
    """Refuses a run that cannot be repeated, or whose result cannot be the same.

    Raises:
        Failure: with all reasons, one a line.
    """
    from src.tracking.tracker import MODEL_TAG

    run_id, tags = run.info.run_id, run.data.tags
    if not config or MODEL_TAG not in tags:
        raise Failure(f"{run_id} is {run.info.status} and recorded no trained model: only complete runs are reproduced")
    if reasons := [*_code_reasons(tags, patch), *_package_reasons(tags), *_data_reasons(tags, config)]:
        raise Failure("\n  ".join([f"{run_id} can't be reproduced here:", *reasons]))


def _code_reasons(tags: Mapping[str, str], patch: str) -> Iterator[str]:
    from src.tracking.provenance import LEFT_OUT

    commit = tags.get("git.commit", "unknown")
    if commit == "unknown":
        yield "code: the run was not started from a git repository"
    else:
        try:
            git("cat-file", "-e", commit)
        except Failure:
            yield f"code: the commit {commit[:12]} is not in this repository: git fetch --all"
    if names := [line.removeprefix(LEFT_OUT) for line in patch.splitlines() if line.startswith(LEFT_OUT)]:
        yield f"code: files of the run were too large to record: {', '.join(names)}"


def _package_reasons(tags: Mapping[str, str]) -> Iterator[str]:
    recorded, current = tags.get("lock.sha256", "unknown"), sha256_of(ROOT / LOCK)
    if recorded != current:
        yield (
            f"packages: {LOCK} had sha256 {recorded[:12]}, has {current[:12]}: "
            f"git checkout {tags.get('git.commit', 'COMMIT')[:12]} -- {LOCK} && make setup"
        )


def _data_reasons(tags: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[str]:
    from src.tracking.tracker import DATA_TAG

    folder = _processed(config)
    for tag, recorded in sorted(tags.items()):
        if not tag.startswith(DATA_TAG):
            continue
        path = folder / f"{tag.removeprefix(DATA_TAG)}.safetensors"
        if not (ROOT / path).is_file():
            yield f"data: {path} is missing: dvc pull, or dvc repro, or the run's command"
        elif (current := sha256_of(ROOT / path)) != recorded:
            yield (
                f"data: {path} had sha256 {recorded[:12]}, has {current[:12]}: "
                f"dvc checkout, or delete {folder} and run dvc repro or the run's command"
            )


def _processed(config: Mapping[str, Any]) -> Path:
    """The folder of the run's packed splits, relative to the repository."""
    return Path(config["data_folder"], "processed", config["profile"]["name"], config["data"]["name"])


def _link_data(config: Mapping[str, Any], worktree: Path) -> None:
    """Links the packed splits of this repository into a worktree."""
    link = worktree / _processed(config)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(ROOT / _processed(config))


def _machine_differences(tags: Mapping[str, str]) -> Iterator[str]:
    from src.tracking.provenance import environment

    current = environment(device="cpu" if tags.get("device") == "cpu" else describe_device("auto"))
    for key in MACHINE:
        if key in tags and current.get(key) != tags[key]:
            yield f"{key} was {tags[key]}, is {current.get(key)}: the last bits may differ"


def code_difference(config: Mapping[str, Any], worktree: Path) -> str:
    """How today's code for training differs from the run's, which is used."""
    try:
        checked = check(config)
    except ConfigError as error:
        return f"today's code refuses the run's configuration ({' '.join(str(error).split())}); the run's code is used"
    run, today = (stage_code("train", checked, root) for root in (worktree, ROOT))
    if run == today:
        return "today's code for training is the run's"
    modules = sorted(
        path for path in run.modules.keys() | today.modules.keys() if run.modules.get(path) != today.modules.get(path)
    )
    return f"today's code for training differs from the run's, which is used: {', '.join(modules) or 'its packages'}"


def _results(client: MlflowClient, run: Run) -> dict[str, str | list[str]]:
    """What must come out the same: digests, and every point of every metric that does not measure time."""
    from src.tracking.tracker import MODEL_TAG, STATE_TAG

    digests = {"weights (sha256)": MODEL_TAG, "optimizer state (sha256)": STATE_TAG}
    results: dict[str, Any] = {name: run.data.tags[tag] for name, tag in digests.items() if tag in run.data.tags}
    for name in sorted(run.data.metrics):
        if not is_clock_metric(name):
            points = client.get_metric_history(run.info.run_id, name)
            results[name] = [value for _, value in sorted({(point.step, repr(point.value)) for point in points})]
    return results


def _compare(recorded: Mapping[str, str | list[str]], reproduced: Mapping[str, str | list[str]]) -> bool:
    """Prints both, line by line; whether all are the same."""
    names = list(dict.fromkeys([*recorded, *reproduced]))
    same = {name: recorded.get(name) == reproduced.get(name) for name in names}
    print(f"\n{'':34} {'recorded':>20} {'reproduced':>20}")
    for name in names:
        cells = (f"{_short(results.get(name)):>20}" for results in (recorded, reproduced))
        print(f"{name:34} {' '.join(cells)}  {'same' if same[name] else 'DIFFERS'}")
    print(f"\n{sum(same.values())} of {len(names)} are the same to the bit")
    return all(same.values())


def _short(result: str | list[str] | None) -> str:
    """The first digits of a digest; the last value of a metric and the number of its points."""
    if result is None:
        return "-"
    if isinstance(result, str):
        return result[:12]
    return f"{float(result[-1]):.6g}" + (f" ({len(result)} points)" if len(result) > 1 else "")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m src.reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_id", help="id of an MLflow run, as its page shows it")
    for name, value in QUIET_AND_BOUNDED.items():
        os.environ.setdefault(name, value)
    try:
        sys.exit(0 if reproduce(parser.parse_args().run_id) else 1)
    except Failure as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
