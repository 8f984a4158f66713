"""Searches the configuration of an experiment with Optuna.

    python -m src.sweep +experiment=cifar10_resnet                       the space of conf/sweep/cifar10_resnet.yaml
    python -m src.sweep +experiment=cifar10_resnet sweep.trials=50 sweep.workers=2       the same study, more trials
    python -m src.sweep +experiment=imdb_lstm sweep.sampler=gp sweep.study=gp profile=full
    python -m src.sweep +experiment=imdb_lstm sweep.pruner=none 'sweep.objectives={val_accuracy: max, parameters: min}'
    python -m src.sweep +experiment=imdb_lstm sweep.storage=postgresql://USER@HOST/DATABASE          on each machine
    python -m src.sweep +experiment=imdb_lstm sweep.storage=journal:/shared/study.log 'sweep.ray={processes: 16}'

The same command resumes a study that was interrupted or killed. Its folder, experiments/sweeps/STUDY, has a table,
plots, and best.yaml, which `python -m src.adopt NAME PATH` writes into params.yaml.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from src.common.credentials import masked
from src.common.errors import ConfigError, Failure
from src.configuration.composing import check, compose_unchecked
from src.configuration.refusing import refusal
from src.sweeping import worker
from src.sweeping.refusals import refuse
from src.sweeping.space import SweepConfig


def sweep(overrides: list[str]) -> None:
    """Runs or resumes the study that Hydra's overrides describe.

    Raises:
        ConfigError: the configuration or the search space is refused; nothing was started.
        Failure: the study is another one or in use, its data can't be prepared, or all trials failed.
    """
    experiments = [match[1] for override in overrides if (match := re.fullmatch(r"\+?experiment=(.+)", override))]
    if experiments and not any(override.startswith("sweep=") for override in overrides):
        overrides = [*overrides, f"sweep={experiments[-1]}"]
    config: SweepConfig = check(compose_unchecked([*overrides, "output=."], SweepConfig), SweepConfig)
    trial_overrides = [override for override in overrides if not re.match(r"\+*sweep[.=]", override)]
    refuse(config, trial_overrides)
    if config.sweep.ray:
        from src.sweeping import on_ray

        on_ray.run(config.sweep.ray, overrides)
        return
    worker.start_fork_server(config.trainer.accelerator)

    from src.sweeping import loop  # while the fork server imports the training code

    loop.run(config, trial_overrides)


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
        sys.exit(refusal(str(error)))
    except Failure as error:
        print(f"sweep failed: {masked(str(error))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
