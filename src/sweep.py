"""Searches the configuration of an experiment with Optuna.

    python -m src.sweep +experiment=cifar10_resnet                                    conf/sweep/cifar10_resnet.yaml
    python -m src.sweep +experiment=cifar10_resnet sweep.trials=50 sweep.workers=2    the same study, further
    python -m src.sweep +experiment=imdb_lstm sweep.sampler=gp sweep.study=gp profile=full
    python -m src.sweep +experiment=imdb_lstm sweep.pruner=none 'sweep.objectives={val_accuracy: max, parameters: min}'
    python -m src.sweep +experiment=imdb_lstm sweep.storage=postgresql://USER@HOST/DATABASE   on each machine
    python -m src.sweep +experiment=imdb_lstm sweep.launcher=ray sweep.workers=16             docs/sweeps.md

The same command goes on with a study that was interrupted or killed. All of it is in experiments/sweeps/STUDY: a table,
plots, and best.yaml, which `python -m src.train +experiment=NAME +best=PATH` trains and `python -m src.adopt NAME PATH`
writes into params.yaml.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from src.common.errors import ConfigError, Failure
from src.configuration.composing import check, compose_unchecked
from src.configuration.refusing import refusal
from src.sweeping import worker
from src.sweeping.refusals import refuse
from src.sweeping.space import SweepConfig


def sweep(overrides: list[str]) -> None:
    """Runs the study that Hydra's overrides describe, or goes on with it.

    Raises:
        ConfigError: the configuration or the search space can't be right; nothing was started.
        Failure: the study is another one, is under way already, or its data can't be prepared.
    """
    chosen = [found[1] for given in overrides if (found := re.fullmatch(r"\+?experiment=(.+)", given))]
    if chosen and not any(given.startswith("sweep=") for given in overrides):
        overrides = [*overrides, f"sweep={chosen[-1]}"]
    config: SweepConfig = check(compose_unchecked([*overrides, "output=."]), SweepConfig)
    shared = [given for given in overrides if not re.match(r"\+*sweep[.=]", given)]
    refuse(config, shared)
    if config.sweep.launcher == "local":
        worker.warm_up(config.trainer.accelerator)

    from src.sweeping import loop

    loop.run(config, shared)


def main() -> None:
    """The command; exit codes: 0 the budget is spent, 1 the sweep failed, 2 refused, 130 and 143 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m src.sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="Hydra's overrides; +experiment=NAME at least"
    )
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        sweep(parser.parse_args().overrides)
    except ConfigError as error:
        sys.exit(refusal(_masked(str(error))))
    except Failure as error:
        print(f"sweep failed: {_masked(str(error))}", file=sys.stderr)
        sys.exit(1)


def _masked(text: str) -> str:
    """The text without the password of an address in it."""
    return re.sub(r"(?<=://)([^/@\s:]*):[^/@\s]*@|(?<=password=)()[^&\s'\"]+", r"\1:***@", text)


if __name__ == "__main__":
    main()
