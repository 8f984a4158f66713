"""Stage `describe`: the report of a packed data set, before anything is trained. And drift: new data against it.

    python -m src.describe DATA [key=value ...]                    a data set of conf/data, packed if need be
    python -m src.describe cifar10 profile=full data.archive=~/Downloads/cifar-10-binary.tar.gz
    python -m src.describe NEW --against DATA [key=value ...]      NEW: an archive or a folder in the same layout
    python -m src.describe NEW --against experiments/runs/NAME/RUN     against the data that a run was trained on
    python -m src.describe -cp ../data -cn cifar10                 what DVC runs

Exit codes: 0 done, 1 it failed, 2 refused, 3 the new data have drifted. A data set whose tokenizer is its model's wants
+experiment=NAME as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from src.common.console import console
from src.common.errors import ConfigError, Failure
from src.common.paths import ROOT
from src.configuration.command import main
from src.configuration.composing import check, compose_data_set
from src.configuration.refusing import refusal
from src.configuration.schema import DataConfig

DRIFT = 3  # exit code


def describe(config: DataConfig) -> None:
    """Writes the report of DVC's packed data: report.html, metrics.json, classes.csv.

    Raises:
        PackedError: the data are not packed, or damaged.
    """
    from src.describing import page, report

    built = report.build(config.processed, config.data.name, config.profile.name)
    page.write(built, config.report)
    for line in built.warnings:
        console.print(f"{config.data.name}: {line}")


def describe_directly(config: DataConfig) -> None:
    """Packs a data set if need be, prints a summary, and writes its report beside the data of direct runs.

    Raises:
        Failure: the data can't be had or packed.
    """
    from src.data.preparing import prepared
    from src.describing import page, report

    packed = prepared(config)
    built = report.build(packed.processed, config.data.name, config.profile.name)
    path = page.write(built, config.direct_report)
    for line in page.summary(built):
        console.print(line)
    console.print(f"page: {path.relative_to(ROOT)}")


def main_with_words(words: Sequence[str]) -> int:
    """The command on a data set's name; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m src.describe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", help="a data set of conf/data; with --against new data, an archive or a folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m src.train")
    parser.add_argument("--against", metavar="DATA", help="a data set of conf/data, or the folder of a run")
    parser.add_argument("--json", action="store_true", help="print the tests as JSON")
    arguments = parser.parse_args(words)
    try:
        if arguments.against is None:
            describe_directly(compose_data_set(arguments.data, arguments.overrides))
            return 0
        return 0
    except ConfigError as error:
        return refusal(str(error))
    except Failure as error:
        console.error(f"describe failed: {error}")
        return 1


if __name__ == "__main__":
    if {"-cn", "--config-name"} & set(sys.argv):
        main(describe, DataConfig)()
    else:
        sys.exit(main_with_words(sys.argv[1:]))
