"""Compares runs: mean, deviation and confidence interval over seeds, what differs, and whether that made a difference.

    python -m src.compare                                     all direct runs and DVC's results
    python -m src.compare cifar10_resnet                      one experiment's
    python -m src.compare experiments/sweeps/STUDY/trials     the runs in a folder
    python -m src.compare --html comparison.html --csv comparison.csv

Read from the files in experiments/, not from MLflow. Seeds make the repetitions:
python -m src.train -m +experiment=NAME seed=0,1,2 model.optimizer.lr=0.1,0.2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from src.common.errors import Failure
from src.common.files import write_text_atomically
from src.common.paths import ROOT

EXPERIMENTS = ROOT / "experiments"


def compare(names: list[str], metrics: list[str], csv: Path | None, page: Path | None) -> None:
    """Prints the comparison and writes the files that are asked for; `names`: experiments or folders, none for all.

    Raises:
        Failure: there are no whole runs, or none has the metric.
    """
    from src.reporting import comparison, comparison_page, tables

    folders = [path for name in names if (path := Path(name)).is_dir()]
    experiments = {name for name in names if not Path(name).is_dir()}
    if not folders:
        kept = [path.parent for path in EXPERIMENTS.glob("*/config.yaml")]
        folders = [*kept, EXPERIMENTS / "runs"]
    runs = [run for run in comparison.read_runs(folders) if not experiments or run.experiment in experiments]
    if not runs:
        where = ", ".join(names) or "experiments/"
        raise Failure(f"{where}: no whole run; python -m src.train +experiment=NAME makes one")
    groups = comparison.grouped([*{run.folder.resolve(): run for run in runs}.values()], EXPERIMENTS)
    measured = sorted({metric for group in groups for metric in group.metrics})
    if unknown := [metric for metric in metrics if metric not in measured]:
        raise Failure(f"{unknown[0]}: no run has this metric; there are {', '.join(measured)}")
    texts = [
        comparison_page.text(group, [m for m in metrics or group.headline if m in group.metrics]) for group in groups
    ]
    print("\n\n".join(texts))
    if csv:
        tables.write_csv(csv, list(comparison_page.rows(groups)))
    if page:
        write_text_atomically(page, comparison_page.page(groups))


def main() -> None:
    """The command; exit codes: 0 done, 1 nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="python -m src.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="experiments, or folders with runs in them")
    parser.add_argument("-m", "--metric", action="append", default=[], help="instead of what training looked at")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="all metrics of all variants as rows")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with tables, curves and intervals")
    arguments = parser.parse_args()
    try:
        compare(arguments.names, arguments.metric, arguments.csv, arguments.html)
    except Failure as error:
        print(f"compare failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
