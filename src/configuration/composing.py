"""Composes `conf/` with overrides, checks the result against the schema, and writes resolved configurations."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.common.errors import ConfigError
from src.common.files import write_text_atomically
from src.common.paths import CONF, ROOT
from src.common.yaml_files import dump_yaml
from src.configuration.declarations import (
    kind_of,
    load_kind,
    load_task,
    owners_of,
    refuse_misfit,
    refuse_monitor,
    task_of,
)
from src.configuration.describing import describe_composed
from src.configuration.refusing import explain_fault, explain_hydra, listed, sections_in
from src.configuration.schema import Build, Config, Data, DataConfig, Section
from src.configuration.targets import attribute_of, schema_of


def _by_profile(values: Any, *, _root_: DictConfig) -> Any:
    name = _root_.profile.name
    if name not in values:
        raise ValueError(f"by_profile has no value for profile {name!r}; it has {listed(values)}")
    return values[name]


def _in_repository(path: str | None) -> str:
    """The path from the repository's root; `--cfg` creates no folder, so there it is the one that a run would have."""
    from hydra.core.hydra_config import HydraConfig

    return os.path.relpath(path or HydraConfig.get().run.dir, ROOT)


def register_resolvers() -> None:
    """`${by_profile:{sample: 2, full: 12}}` picks by profile.

    `${unique:}` is new in each process, so no two runs share a folder; `${in_repository:PATH}` is the path from the
    repository's root, so that what a run writes about itself does not name this machine's folders. `${keys:}` describes
    all keys, for `--help`.
    """
    OmegaConf.register_new_resolver("by_profile", _by_profile, replace=True)
    OmegaConf.register_new_resolver("keys", lambda *, _root_: describe_composed(_root_, check), replace=True)
    OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("in_repository", _in_repository, replace=True)


def check(composed: DictConfig | Mapping[str, Any], schema: type[DataConfig] = Config) -> Any:
    """Checks a composed configuration against the schema.

    Raises:
        ConfigError: with one line per fault.
    """
    register_resolvers()
    try:
        content: Any = composed
        if isinstance(composed, DictConfig):
            content = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        if schema is DataConfig:
            content = {key: content[key] for key in DataConfig.model_fields if key in content}
        schema = _with_declared_options(content, schema)
        checked = schema.model_validate(content)
        if isinstance(checked, Config):
            refuse_monitor(checked)
            _refuse_unequal_shares(checked)
            _refuse_measured_algorithms(checked)
            _refuse_accumulation(checked)
        return checked
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(
            "\n".join(dict.fromkeys(_explained(fault, content, schema) for fault in error.errors()))
        ) from None


def _with_declared_options(content: Mapping[str, Any], schema: type[DataConfig]) -> type[DataConfig]:
    """The schema with the parameters of the configured targets, and the options of their task and kind of data.

    Raises:
        ConfigError: a target may not be named, or the model does not take this kind of data.
    """
    sections: dict[str, Any] = {}
    if "data" in content:
        base = Data
        if kind := kind_of(content["data"]):
            base = pydantic.create_model("Data", __base__=Data, loader=(load_kind(kind).options | None, None))
        sections["data"] = (schema_of(base, content["data"], "data"), ...)
    if "model" in content:
        sections["model"] = (schema_of(Build, content["model"], "model"), ...)
        options = load_task(task_of(content["model"])).options
        sections["evaluation"] = (options, options())
    if sections.keys() >= {"data", "model"}:
        refuse_misfit(content["data"], content["model"])
    return pydantic.create_model(schema.__name__, __base__=schema, **sections)


def _explained(fault: Any, content: Any, schema: type[DataConfig]) -> str:
    """One line for one of pydantic's faults; of an unknown key also whose option it is."""
    line = explain_fault(fault, content, schema)
    return line + owners_of(line.partition(":")[0]) if fault["type"] == "extra_forbidden" else line


def _refuse_measured_algorithms(config: Config) -> None:
    """Refuses `trainer.benchmark` in deterministic mode: which algorithm is the fastest differs from run to run.

    Raises:
        ConfigError: both are on.
    """
    if config.trainer.benchmark and config.trainer.deterministic:
        raise ConfigError("trainer.benchmark: true is not deterministic; set trainer.deterministic=false as well")


def _refuse_accumulation(config: Config) -> None:
    """Refuses to accumulate gradients where the model, or a CUDA graph, takes the optimizer's steps itself.

    Raises:
        ConfigError: with the remedy.
    """
    if config.trainer.accumulate_grad_batches == 1:
        return
    key = "trainer.accumulate_grad_batches"
    if attribute_of(config.model.target, "automatic_optimization") is False:
        raise ConfigError(
            f"{key}: {config.model.target} takes its optimizers' steps itself; use data.loader.batch_size"
        )
    if config.trainer.cuda_graphs:
        raise ConfigError(f"{key}: a CUDA graph takes an optimizer step each batch; set trainer.cuda_graphs=false")


def _refuse_unequal_shares(config: Config) -> None:
    """Processes' gradients are averaged: with unequal shares of a batch some examples would count more than others."""
    size, processes = config.loader.batch_size, config.trainer.processes
    if size % processes:
        raise ConfigError(
            f"data.loader.batch_size: {size} can't be shared out evenly among {processes} processes (trainer.devices, "
            f"trainer.num_nodes); the next that can is {size + processes - size % processes}"
        )


def overrides_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested values as Hydra's overrides; a null stays a null, `default` leaves conf/'s value alone.

    A section with a name or a class of its own, such as an optimizer, is exchanged as a whole; the sections on the top
    are groups, which are not.
    """
    for key, value in values.items():
        if isinstance(value, Mapping) and "name" not in value and not (prefix and "_target_" in value):
            yield from overrides_of(value, f"{prefix}{key}.")
        elif value != "default":
            yield f"{prefix}{key}={quoted(value)}"


def quoted(value: Any) -> str:
    """A value in Hydra's grammar, whose strings know no escape but that of a quote."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        return QuotedString(value, Quote.double).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {quoted(item)}' for key, item in value.items() if item != 'default')}}}"
    return json.dumps(value)


# Hydra's own keys whose values are paths.
FOLDERS = frozenset({"hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"})


@functools.cache
def _text_keys(schema: type[Section], prefix: str = "") -> frozenset[str]:
    """The dotted keys of a schema whose values are texts, such as paths."""
    keys = set()
    for name, field in schema.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if field.annotation in (str, str | None):
            keys.add(key)
        for section in sections_in(field.annotation):
            keys |= _text_keys(section, f"{key}.")
    return frozenset(keys)


def _with_quoted_text(override: str, keys: frozenset[str], *, is_multirun: bool) -> str:
    """Quotes the value of a key that holds a text, so that it may have any characters; with `-m` a comma separates."""
    match = re.fullmatch(r"(\+*([\w.]+)=)(.+)", override, re.DOTALL)
    if not match or match[2] not in keys:
        return override
    values = match[3].split(",") if is_multirun else [match[3]]
    if match[3][0] in "\"'" or (is_multirun and re.fullmatch(r"(choice|glob|range|shuffle|sort)\(.*\)", match[3])):
        return override
    return match[1] + ",".join(value if value == "null" else quoted(value) for value in values)


def as_assignments(overrides: list[str], schema: type[Section] = Config) -> list[str]:
    """Rewrites overrides so that Hydra does what they look like.

    `a.b=1` adds a missing key, so that the schema, which suggests the nearest name, refuses it instead of
    Hydra; `a.b={...}` replaces a section instead of merging into it, so that an optimizer can be exchanged;
    `+experiment=` is how Hydra's users know it, though the group stands in the defaults list so that `debug` comes
    after it; `debug=null` drops it. A text or a path of `schema` needs no quotes of Hydra's.
    """
    assignments: list[str] = []
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    keys, is_multirun = _text_keys(schema) | FOLDERS, not {"-m", "--multirun"}.isdisjoint(overrides)
    for override in (_with_quoted_text(override, keys, is_multirun=is_multirun) for override in overrides):
        if re.match(r"[+~]*=", override):
            raise ConfigError(f"{override}: has no key before the =; write key=value")
        if re.fullmatch(r"\++(\w+)=null", override) and override.lstrip("+").partition("=")[0] in groups:
            raise ConfigError(f"{override}: null is no option of a group; write {override.lstrip('+')[:-4]}NAME")
        match = re.fullmatch(r"(?!hydra\b)(\w+(?:\.\w+)*)=(.*)", override, re.DOTALL)
        if match and match[1] in groups:
            assignments.append(f"~{match[1]}" if match[2] == "null" else override)
        elif match and match[2].startswith("{"):
            assignments += [f"++{match[1]}=null", f"++{override}"]
        else:
            assignments.append(f"++{override}" if match else "experiment=".join(override.split("+experiment=", 1)))
    return assignments


def compose(overrides: list[str]) -> Config:
    """Composes `conf/` with Hydra's overrides and checks the result.

    Raises:
        ConfigError: with one line per fault.
    """
    return check(compose_unchecked(overrides))


def compose_unchecked(overrides: list[str], schema: type[Section] = Config) -> DictConfig:
    """Composes `conf/` with Hydra's overrides; interpolations are not resolved yet.

    Raises:
        ConfigError: Hydra refuses it.
    """
    import hydra
    from hydra.errors import HydraException

    register_resolvers()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", as_assignments(overrides, schema))
    # OSError: a key that is too long; ValueError: Hydra's, of a group without an option
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(explain_hydra(error)) from None


def compose_data_set(name: str, overrides: list[str]) -> DataConfig:
    """Composes one data set of `conf/data` with Hydra's overrides; one that names keys of a model with its experiment.

    Raises:
        ConfigError: with one line per fault.
    """
    has_model = any(override.lstrip("+").startswith("experiment=") for override in overrides)
    composed = compose_unchecked([f"data={quoted(name)}", *([] if has_model else ["~model"]), *overrides])
    try:
        sections: dict[str, Any] = {
            key: OmegaConf.to_container(composed[key], resolve=True, throw_on_missing=True)
            for key in ("profile", "data")
        }
    except OmegaConfBaseException as error:
        remedy = "" if has_model else "; is it a model's? Then add +experiment=NAME"
        raise ConfigError(f"{error.full_key or 'data'}: {str(error).splitlines()[0]}{remedy}") from None
    data_set: DataConfig = check(sections, DataConfig)
    return data_set


# A stage that is called on a resolved file writes where that file says: Hydra has no folder of its own to make.
RESOLVED_HEAD = {
    "defaults": ["_self_", {"override hydra/job_logging": "stdout"}],
    "hydra": {"run": {"dir": "."}, "output_subdir": None},
}


def write_resolved(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a resolved configuration that the stages can be called on: `-cp FOLDER -cn NAME`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "# Resolved from conf/ (and params.yaml): change those, not this.\n"
    write_text_atomically(path, header + dump_yaml(RESOLVED_HEAD | dict(content), allow_unicode=True, width=120))
