"""Several runs in one command, `-m`. Replaces a method of Hydra's, checked with 1.3.8."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from src.common.console import console
from src.common.errors import ConfigError
from src.common.paths import ROOT
from src.configuration.schema import DataConfig


@dataclass
class Job:
    """One run of several."""

    overrides: str  # those that tell it from the others
    config: DictConfig  # as Hydra composed it
    folder: str  # of the run, relative to the repository
    parent: str  # the folder of the experiment's runs of this command
    state: str = "not started"


def replace_sweeper(
    check: Callable[[DictConfig], DataConfig], attempt: Callable[[DictConfig], str | None], *, goes_on: bool
) -> None:
    """Has Hydra's `-m` check all runs before it starts the first, go on after a failed one, and print a summary.

    Hydra's own sweeper starts what it has composed, stops at the first failure, and wants one folder for all
    experiments. `check` raises ConfigError; `attempt` does one run and returns why it failed. Where the runs share
    processes that a launcher started, which a failure ends, they do not go on (`goes_on`).
    """
    from hydra.core.plugins import Plugins

    def instantiate(_: Plugins, *, hydra_context: Any, task_function: Any, config: DictConfig) -> _Sweeper:
        return _Sweeper(hydra_context, config, check, attempt, goes_on)

    Plugins.instantiate_sweeper = instantiate  # type: ignore[method-assign, assignment]


@dataclass
class _Sweeper:
    """What Hydra calls for `-m`."""

    context: Any
    config: DictConfig
    check: Callable[[DictConfig], DataConfig]
    attempt: Callable[[DictConfig], str | None]
    goes_on: bool

    def sweep(self, arguments: list[str]) -> None:
        """Runs all combinations of the alternatives in `arguments`; exits with 1 where a run failed."""
        from hydra.core.utils import run_job

        jobs = _compose(self.context.config_loader, self.config, arguments)
        _check(jobs, self.check)
        try:
            for number, job in enumerate(jobs, start=1):
                console.print(f"run {number} of {len(jobs)}: {job.overrides}")
                job.state = "interrupted"
                try:
                    failure = run_job(
                        hydra_context=self.context,
                        task_function=self.attempt,
                        config=job.config,
                        job_dir_key="hydra.sweep.dir",
                        job_subdir_key="hydra.sweep.subdir",
                    ).return_value
                except OSError as error:  # `attempt` raises none
                    failure = explain_folder(error)
                job.state = f"failed: {failure}" if failure else "done"
                if failure and not self.goes_on:
                    break
        finally:
            for line in _summary(jobs):
                console.print(line)
        if any(job.state != "done" for job in jobs):
            sys.exit(1)


def explain_folder(error: OSError) -> str:
    """One line for the folder of a run that cannot be made."""
    path = str(error.filename)
    return (
        f"{path if len(path) < 200 else f'{path[:200]}...'}: cannot be made ({error.strerror}); choose another folder"
    )


def _compose(loader: Any, master: DictConfig, arguments: list[str]) -> list[Job]:
    """Composes every combination of the alternatives, without a change to any file.

    Raises:
        ConfigError: an override has no alternatives that can be counted, or gives all runs one folder.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    settings: Any = OmegaConf.to_container(master.hydra.overrides.hydra)
    if any(override.lstrip("+").startswith("hydra.run.dir=") for override in settings):
        raise ConfigError("hydra.run.dir: is the folder of a single run; with -m write hydra.sweep.dir=FOLDER")
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    alternatives = [list(_alternatives(override)) for override in parsed]
    swept = [override.is_sweep_override() for override in parsed]
    jobs = []
    for number, combination in enumerate(itertools.product(*alternatives)):
        config = loader.load_sweep_config(master, list(combination))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            parent = os.path.abspath(config.hydra.sweep.dir)
            config.hydra.runtime.output_dir = os.path.join(parent, str(config.hydra.sweep.subdir))
        OmegaConf.copy_cache(config, master)  # the next ones have the same time and the same `unique` in their folders
        words = [
            word.lstrip("+") for word, is_swept in zip(combination, swept, strict=True) if is_swept or not any(swept)
        ]
        folder, parent = (os.path.relpath(path, ROOT) for path in (config.hydra.runtime.output_dir, parent))
        jobs.append(Job(" ".join(words), config, folder, parent))
    return jobs


def _alternatives(override: Any) -> Iterator[str]:
    """An override's alternatives, as overrides."""
    if not override.is_sweep_override():
        yield override.input_line
        return
    key = override.get_key_element()
    values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    if not values:
        line = override.input_line.lstrip("+")
        raise ConfigError(f"{line}: names no values to run; write a list (1,2,3), range(1,4) or a glob that matches")
    for value in values:
        yield f"{key}={value}"


def _check(jobs: list[Job], check: Callable[[DictConfig], DataConfig]) -> None:
    """Checks all runs, and that no two of them write to one folder.

    Raises:
        ConfigError: with one line per fault.
    """
    from hydra.core.hydra_config import HydraConfig

    faults: dict[str, None] = {}
    writers: dict[str, Job] = {}
    for job in jobs:
        HydraConfig.instance().set_config(job.config)
        content = job.config.copy()
        with open_dict(content):
            del content["hydra"]
        try:
            config = check(content)
        except ConfigError as error:
            faults |= dict.fromkeys(str(error).splitlines())
            continue
        job.folder = getattr(config, "output", job.folder)
        if (other := writers.setdefault(job.folder, job)) is not job:
            line = f"{job.folder}: two runs would write there ({other.overrides}; {job.overrides})"
            faults[f"{line}; leave output and hydra.sweep.subdir as conf/ says"] = None
    if faults:
        raise ConfigError("\n".join(faults))


def _summary(jobs: list[Job]) -> Iterator[str]:
    """What ran and what failed, and the command that compares the runs."""
    done = [job for job in jobs if job.state == "done"]
    yield f"\n{len(done)} of {len(jobs)} runs are done"
    width = max(len(job.overrides) for job in jobs)
    for job in jobs:
        yield f"  {job.overrides:{width}}  {job.folder if job in done else job.state}"
    if len(done) > 1:
        yield f"compare them: python -m src.compare {' '.join(dict.fromkeys(shlex.quote(job.parent) for job in done))}"
