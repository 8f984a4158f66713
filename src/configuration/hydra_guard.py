"""Keeps Hydra from running foreign code that a configuration names. Leans on hydra._internal, checked with 1.3.8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.common.errors import ConfigError
from src.configuration.targets import targets_in


def guard_hydra() -> None:
    """Has Hydra's own section of a configuration checked before Hydra acts on it.

    Hydra instantiates its callbacks, configures logging by class names and sets environment variables before the schema
    sees anything: a configuration from elsewhere could run whatever is installed. Hydra has no hook for this.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    load = ConfigLoaderImpl.load_configuration

    def guarded(*args: Any, **options: Any) -> DictConfig:
        composed = load(*args, **options)
        _refuse_foreign_code(OmegaConf.to_container(composed.hydra, resolve=False))
        return composed

    ConfigLoaderImpl.load_configuration = guarded  # type: ignore[method-assign]


def _refuse_foreign_code(section: Any) -> None:
    """Raises ConfigError where the section `hydra` names code that is not Hydra's."""
    import hydra

    for path, target in targets_in(section, "hydra"):
        if not target.startswith(("hydra._internal.core_plugins.", "hydra_plugins.")):
            raise ConfigError(f"{path}: {target!r} is not allowed: only Hydra's own plugins are instantiated there")
    if section["job"]["env_set"]:  # git and the stages' processes would obey them
        raise ConfigError("hydra.job.env_set: is not allowed: set environment variables in the shell")
    for key in ("hydra_logging", "job_logging"):
        built_in = Path(hydra.__file__).parent.glob(f"conf/hydra/{key}/*.yaml")
        if not any(section[key] == OmegaConf.load(path) for path in built_in):
            raise ConfigError(f"hydra.{key}: is not allowed: choose one of Hydra's own, as in hydra/{key}=default")
