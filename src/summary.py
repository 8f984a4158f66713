"""One line for each experiment of `dvc repro`: its headline metric, which direction is better, how long training took.

python -m src.summary            the experiments under `run:` in params.yaml
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from src.common.paths import ROOT
from src.common.run_folder import RunFolder
from src.common.yaml_files import read_yaml
from src.reporting import comparison

NAME_WIDTH, METRIC_WIDTH = 24, 24  # letters, so that a line has less than 80
BETTER = {"max": "higher", "min": "lower", None: ""}
FOOTER = (
    "models:    experiments/NAME/export/      pictures: experiments/NAME/evaluation/",
    "all runs:  make ui                       all figures: dvc metrics show",
)
SAMPLE_NOTE = "The data is the sample: these figures show that the pipeline works, no more."


def summary(root: Path = ROOT) -> Iterator[str]:
    """The summary's lines, of less than 80 letters each."""
    names = list(read_yaml(root / "params.yaml")["run"])
    profiles = set()
    yield _line("experiment", "metric", "value", "better", "training")
    for name in names:
        folder = RunFolder(root / "experiments" / name)
        run = comparison.read_run(folder.path)
        if run is None:
            yield _line(name, "no result: dvc repro")
            continue
        profiles.add(run.profile)
        metric = comparison.headline_of([run])[-1]
        value = f"{run.metrics[metric]:.4g}" if metric in run.metrics else ""
        yield _line(name, metric, value, BETTER[run.direction(metric)], _training_time(folder))
    yield from ("", *FOOTER)
    if "sample" in profiles:
        yield SAMPLE_NOTE


def _line(name: str, metric: str, value: str = "", better: str = "", time: str = "") -> str:
    columns = f"{_cut(name, NAME_WIDTH)} {_cut(metric, METRIC_WIDTH)} {value:>9}  {better:7} {time:>9}"
    return columns.rstrip()


def _training_time(folder: RunFolder) -> str:
    """The seconds of the training of the weights that lie in the folder; they are not known where DVC fetched them."""
    try:
        note, trained = (json.loads(path.read_text()) for path in (folder.training_time, folder.model_note))
        return f"{note['seconds']:.0f} s" if note["sha256"] == trained["sha256"] else "elsewhere"
    except (OSError, ValueError, KeyError):
        return "elsewhere"


def _cut(text: str, width: int) -> str:
    return f"{text if len(text) <= width else text[: width - 1] + '…':{width}}"


def main() -> None:
    """The command."""
    argparse.ArgumentParser(
        prog="python -m src.summary", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    print("\n".join(summary()))


if __name__ == "__main__":
    main()
