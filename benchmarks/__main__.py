"""Runs the benchmarks and prints one table.

python -m benchmarks                                     everything that is quick, about five minutes on two cores
python -m benchmarks training -e imdb_lstm --rounds 9    one benchmark, one experiment, more rounds
python -m benchmarks training trainer=gpu                Hydra's overrides, for all experiments
python -m benchmarks pipeline --slow                     the whole sample pipeline in a clean clone
python -m benchmarks image_folder --rounds 3             class folders of JPEGs against torchvision's ImageFolder
python -m benchmarks gpu --archives FOLDER --record airbench94_muon.py    on a machine with a GPU, under nine minutes
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from src.common.errors import Failure

QUICK = ("machine", "training", "memory", "inference", "pipeline", "sweep")
NAMES = (*QUICK, "image_folder", "gpu")


def main() -> int:
    """Exit codes: 0 measured (also where a target is missed), 1 a benchmark failed, 2 wrong arguments."""
    arguments = _parser().parse_intermixed_args()
    overrides = [word for word in arguments.names if "=" in word]
    names = [word for word in arguments.names if "=" not in word] or list(QUICK)
    if unknown := set(names) - set(NAMES):
        print(f"benchmarks: {', '.join(sorted(unknown))} unknown; allowed: {', '.join(NAMES)}", file=sys.stderr)
        return 2

    from benchmarks import machine, table
    from benchmarks.setting import EXPERIMENTS, Setting

    figures, has_failed = [], False
    with Setting.temporary(
        experiments=tuple(arguments.experiment or EXPERIMENTS),
        overrides=tuple(overrides),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        slow=arguments.slow,
        archives=arguments.archives,
        record=tuple(arguments.record or ()),
    ) as setting:
        for name in names:
            print(f"measuring: {name} ...", file=sys.stderr, flush=True)
            try:
                figures += importlib.import_module(f"benchmarks.{name}").measure(setting)
            except Failure as error:  # the figures of the others are still printed
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                has_failed = True
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    table.print_table(figures, machine.description() | {"command": command})
    return int(has_failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(NAMES)}; and Hydra's overrides, key=value")
    parser.add_argument("-e", "--experiment", action="append", metavar="NAME", help="one experiment; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate length of a training turn (default 2)")
    parser.add_argument("--slow", action="store_true", help="also the figures that take many minutes")
    parser.add_argument("--archives", type=Path, metavar="FOLDER", help="gpu: a folder with the official archives")
    parser.add_argument("--record", type=Path, action="append", metavar="FILE", help="gpu: public record code to run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
