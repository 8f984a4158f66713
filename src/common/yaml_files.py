"""Reads and writes the YAML that DVC shares: params.yaml and resolved configurations. Files in conf/ are Hydra's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from src.common.errors import ConfigError


def parse_yaml(text: str, source: str) -> Any:
    """The content of a YAML text, which constructs plain values only; `source` names it in errors.

    As DVC reads it: 1e-5 is a number, which is a string to PyYAML (YAML 1.1), and `yes` is a string.

    Raises:
        ConfigError: it is not YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ConfigError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: it is not YAML.
        OSError: it can't be read.
    """
    return parse_yaml(path.read_text(encoding="utf-8"), path.name)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that are numbers in YAML 1.2 as well, such as '1e-5'."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$"), list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"0o[0-7]+$"), ["0"])


def dump_yaml(content: Any, **layout: Any) -> str:
    """Plain values as YAML in their order; `layout` as PyYAML takes it."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, **layout)
