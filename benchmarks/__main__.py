"""Measures and prints one table.

python -m benchmarks                                     everything that is quick, about five minutes on two cores
python -m benchmarks training -e imdb_lstm --rounds 9    one benchmark, one experiment, more rounds
python -m benchmarks training trainer=gpu                Hydra's overrides, for all experiments
python -m benchmarks pipeline --slow                     the whole sample pipeline in a clean clone
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from src.common.errors import Failure

NAMES = ("machine", "training", "memory", "inference", "pipeline", "sweep")


def main() -> int:
    """Exit codes: 0 measured (also where a target is missed), 1 a benchmark failed, 2 wrong arguments."""
    arguments = _parser().parse_intermixed_args()
    overrides = [given for given in arguments.names if "=" in given]
    names = [given for given in arguments.names if "=" not in given] or list(NAMES)
    if unknown := set(names) - set(NAMES):
        print(f"benchmarks: {', '.join(sorted(unknown))} unknown; allowed: {', '.join(NAMES)}", file=sys.stderr)
        return 2

    from benchmarks import machine, table
    from benchmarks.setting import EXPERIMENTS, Setting

    figures, failed = [], False
    with Setting.temporary(
        experiments=tuple(arguments.experiment or EXPERIMENTS),
        overrides=tuple(overrides),
        archives=arguments.data,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        slow=arguments.slow,
    ) as setting:
        for name in names:
            print(f"measuring: {name} ...", file=sys.stderr, flush=True)
            try:
                figures += importlib.import_module(f"benchmarks.{name}").measure(setting)
            except Failure as error:  # what the others measured is not lost
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                failed = True
    described = machine.description() | {"command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])}
    table.print_table(figures, described)
    if arguments.markdown:
        arguments.markdown.write_text(table.as_markdown(figures, described))
    if arguments.json:
        arguments.json.write_text(table.as_json(figures, described))
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; and Hydra's overrides, key=value")
    parser.add_argument("-e", "--experiment", action="append", metavar="NAME", help="one experiment; may be repeated")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="official archives; else data is generated")
    parser.add_argument("--rounds", type=int, default=5, help="how often candidates take turns (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of training in a turn, roughly (default 2)")
    parser.add_argument("--slow", action="store_true", help="also what takes many minutes")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="writes the table as markdown as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all figures as JSON as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
