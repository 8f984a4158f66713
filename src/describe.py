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
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.console import console
from src.common.errors import ConfigError, Failure
from src.common.paths import input_path
from src.common.yaml_files import read_yaml
from src.configuration.command import main
from src.configuration.composing import check, compose_data_set
from src.configuration.refusing import refusal
from src.configuration.schema import DataConfig

if TYPE_CHECKING:
    from src.describing.drift import Test

DRIFT = 3  # exit code
ALL_WORDS = 10**8  # entries of a vocabulary that leaves no word out


def describe(config: DataConfig) -> None:
    """Writes the report of DVC's packed data: report.html, metrics.json, classes.csv, features.csv.

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
    console.print("\n".join([*page.summary(built), f"page: {os.path.relpath(path)}"]))


def new_and_reference(archive: str, against: str, overrides: list[str]) -> tuple[DataConfig, DataConfig]:
    """The configurations of new data and of those that they are compared with: the same packing, but for words.

    Raises:
        ConfigError: there is no such data set or run, or no such archive.
    """
    folder = Path(against)
    if (folder / "config.yaml").is_file():
        reference: DataConfig = check(read_yaml(folder / "config.yaml"), DataConfig)
    else:
        reference = compose_data_set(against, overrides)
    if "://" not in archive and not input_path(archive).exists():
        raise ConfigError(
            f"{archive}: no such file or folder; give new data, an archive or a folder in the same layout"
        )
    source: dict[str, Any] = {"archive": archive, "sha256": None}
    profile = reference.profile.model_copy(update={"name": "full"})
    data = reference.data.model_copy(update=source)
    new = reference.model_copy(update={"profile": profile, "data": data, "data_folder": "data", "archive_folder": None})
    return new, reference


def drift_of(new: DataConfig, against: DataConfig) -> list[Test]:
    """The tests of all new examples against the training examples.

    Raises:
        Failure: the data can't be had or packed, or are of another kind.
    """
    from src.data import subwords
    from src.data.preparing import prepared
    from src.describing import joined, load, reference, report
    from src.describing.drift import compare

    meta, _, splits = report.examine(prepared(against).processed)
    if hasattr(new.data, "vocabulary") and meta.get("tokenizer", {}).get("name") != subwords.NAME:
        # Words that the training data lack are to be told from those that are rare in the new data.
        new = new.model_copy(update={"data": new.data.model_copy(update={"vocabulary": ALL_WORDS})})
    _, _, examined = report.examine(prepared(new).processed, meta)
    return compare(reference(load(meta["kind"]), splits), joined(examined.values()))


def table_of(tests: Sequence[Test]) -> Iterator[str]:
    """The tests as lines: what has drifted first."""
    drifted = [test for test in tests if test.is_drift]
    yield f"drift in {len(drifted)} of {len(tests)} features" if drifted else f"no drift in {len(tests)} features"
    yield f"{'':6}{'feature':22}{'test':20}{'effect':>7}{'p':>9}  change"
    for test in tests:
        mark = "drift" if test.is_drift else ""
        yield f"{mark:6}{test.feature[:21]:22}{test.name:20}{test.effect:7.3f}{test.p:9.2g}  {test.change}"[:100]


def main_with_words(words: Sequence[str]) -> int:
    """The command on a data set's name; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m src.describe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", help="a data set of conf/data; with --against new data, an archive or a folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m src.train")
    parser.add_argument("--against", metavar="DATA", help="a data set of conf/data, or the folder of a run")
    parser.add_argument("--json", action="store_true", help="print the tests as JSON")
    arguments = parser.parse_intermixed_args(words)
    try:
        if arguments.against is None:
            describe_directly(compose_data_set(arguments.data, arguments.overrides))
            return 0
        new, against = new_and_reference(arguments.data, arguments.against, arguments.overrides)
        tests = drift_of(new, against)
        if arguments.json:
            console.print(json.dumps([asdict(test) | {"is_drift": test.is_drift} for test in tests], indent=2))
        else:
            console.print("\n".join(table_of(tests)))
        return DRIFT if any(test.is_drift for test in tests) else 0
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
