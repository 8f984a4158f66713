"""params.yaml: what DVC runs. Its overrides are checked when they are composed; its form is checked here."""

from __future__ import annotations

from typing import Any

import pydantic

from src.common.errors import ConfigError
from src.common.paths import ROOT
from src.common.yaml_files import read_yaml
from src.configuration.refusing import explain_fault
from src.configuration.schema import Section

PARAMS = ROOT / "params.yaml"


class Experiment(Section):
    """How DVC runs an experiment, where it is not as conf/ says."""

    overrides: dict[str, Any] | None = None


class Params(Section):
    """The keys of params.yaml."""

    profile: str
    trainer: str
    run: dict[str, str]  # experiment -> its data set
    data: dict[str, dict[str, Any] | None]  # data set -> overrides of its section
    experiments: dict[str, Experiment | None] | None = None


def read_params() -> dict[str, Any]:
    """The content of params.yaml.

    Raises:
        ConfigError: it is not YAML, or not of this form; with one line per fault.
    """
    content: Any = read_yaml(PARAMS)
    try:
        Params.model_validate(content)
    except pydantic.ValidationError as error:
        lines = (f"params.yaml: {explain_fault(fault, content, Params)}" for fault in error.errors())
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    return dict(content)
