"""Turns a stage's function into a command: Hydra's options, the schema's check, one-line errors, exit codes."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.common.console import console
from src.common.credentials import masked
from src.common.dvc_stage import end_with_dvc, restore_outputs
from src.common.errors import NO_ROOM, ConfigError, Failure
from src.common.files import write_text_atomically
from src.common.garbage import skip_collection_at_exit
from src.common.paths import CONF
from src.configuration.composing import as_assignments, check, register_resolvers
from src.configuration.hydra_guard import guard_hydra
from src.configuration.multirun import explain_folder, replace_sweeper
from src.configuration.refusing import experiments, explain_hydra, refusal
from src.configuration.schema import Config, DataConfig


def bound_spinning() -> None:
    """Lets a thread of OpenMP sleep after a thousand turns of waiting for the others, unless the user has a policy.

    By default it spins for 300,000. With another busy process on two cores both threads of the LSTM's training shared
    one core, and 40 steps took more than 300 s; so bounded 23 s, and 12 s as before on an idle machine. The bits are
    the same. For libgomp, which reads this when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(
    stage: Callable[[Any], None],
    schema: type[DataConfig] = Config,
    *,
    refuse: Callable[[Any], None] = lambda config: None,
    goes_on: bool = True,
) -> Callable[[], None]:
    """Turns a stage's function into a command: `@hydra.main` on `conf/`, the schema's check, and one-line errors.

    `refuse` raises ConfigError where this machine cannot do what a configuration asks for. `goes_on`: after a failed
    run of several (`-m`) with the next one.

    Exit codes: 0 done, 1 the stage failed, 2 the configuration was refused.
    """
    import hydra
    from hydra.errors import HydraException

    def checked(composed: DictConfig) -> Any:
        config = check(composed, schema)
        refuse(config)
        return config

    def attempt(composed: DictConfig) -> str | None:
        """Runs the stage; returns why it failed, which it has printed."""
        try:
            stage(checked(composed))
        except Exception as error:
            if not (line := _explained(error)):
                traceback.print_exc()
                line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            console.error(f"{stage.__name__} failed: {line}")
            return line
        return None

    def command() -> None:
        register_resolvers()
        if not {"-sc", "--shell-completion"} & set(sys.argv):  # whose `query=bash` is no key
            try:
                sys.argv[1:] = as_assignments(sys.argv[1:])
            except ConfigError as error:
                sys.exit(refusal(str(error)))
        if {"-h", "--help"} & set(sys.argv) and not re.search(r"experiment=| -cn| --config-name", " ".join(sys.argv)):
            sys.argv.append(f"experiment={experiments()[0]}")  # help shows a whole configuration
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors: `explain_hydra` words them
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        bound_spinning()

        started = False

        @functools.wraps(stage)  # Hydra takes a relative `-cp` as relative to the file of the wrapped function: src/
        def run(composed: DictConfig) -> None:
            nonlocal started
            started = True
            _mask_hydra_files()
            try:
                config = checked(composed)
            except ConfigError as error:
                _remove_run_folder()
                sys.exit(refusal(str(error)))
            try:
                stage(config)
            except ConfigError as error:
                sys.exit(refusal(str(error)))
            except Exception as error:
                if not (line := _explained(error)):
                    raise
                # Hydra, which lets an exit pass, would print "Error executing job" before it
                console.error(f"{stage.__name__} failed: {line}")
                sys.exit(1)

        skip_collection_at_exit()
        end_with_dvc()
        guard_hydra()
        replace_sweeper(checked, attempt, goes_on=goes_on)
        try:
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(run)()
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            restore_outputs()
            sys.exit(refusal(explain_hydra(error)))
        except OSError as error:  # Hydra's, which makes the folder of a run
            restore_outputs()
            if started:
                raise
            if line := _explained(error):
                console.error(f"{stage.__name__} failed: {line}")
                sys.exit(1)
            sys.exit(refusal(f"hydra.run.dir: {explain_folder(error)}"))
        except ConfigError as error:  # the guard's
            restore_outputs()
            sys.exit(refusal(str(error)))
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                restore_outputs()
            if isinstance(error, KeyboardInterrupt):
                sys.exit(130)
            raise

    return command


def _explained(error: Exception) -> str | None:
    """One line for an error that needs no traceback, else None."""
    if isinstance(error, Failure):
        return masked(" ".join(str(error).splitlines()))  # the name of a file may hold a line break
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        remedy = "free some space and run the same command again"
        return f"no room to write {error.filename or 'its outputs'} ({error.strerror}): {remedy}"
    return None


def _mask_hydra_files() -> None:
    """Masks credentials in what Hydra wrote before the stage: the overrides and the configuration of this run."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if not hydra.output_subdir:
        return
    for path in Path(hydra.runtime.output_dir, hydra.output_subdir).glob("*.yaml"):
        if (text := path.read_text()) != masked(text):
            write_text_atomically(path, masked(text))


def _remove_run_folder() -> None:
    """Removes the folder that Hydra created for a refused run; a stage on a resolved file has no such folder."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if hydra.output_subdir:
        folder = Path(hydra.runtime.output_dir)
        shutil.rmtree(folder / hydra.output_subdir)
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
