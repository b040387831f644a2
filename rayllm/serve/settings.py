"""Settings as tables of plain values, such as a file or a Serve application's `args` has them, made a configuration.

A table for each part of `EngineConfig`, and `serve` for `ServeConfig`. Knows neither files nor their formats.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.core.errors import ConfigError
from rayllm.core.settings_errors import refused_setting
from rayllm.serve.config import ServeConfig

Sections = dict[str, dict[str, Any]]
_Config = TypeVar("_Config")

_ENGINE = {"model": ModelConfig, "parallel": ParallelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}


def check_sections(where: str, tables: Mapping[str, Any]) -> Sections:
    """Names checked, values not yet. Raises ConfigError that names the key; `where` it was found."""
    valid = {section: [field.name for field in dataclasses.fields(config)] for section, config in _ENGINE.items()}
    valid["serve"] = [field.name for field in dataclasses.fields(ServeConfig) if field.name != "engine"]
    for section, values in tables.items():
        check_name(where, section, valid)
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {section}: must be a table, [{section}]")
        for name in values:
            check_name(where, f"{section}.{name}", [f"{section}.{each}" for each in valid[section]])
    return dict(tables)


def engine_config(sections: Sections) -> EngineConfig:
    """Raises ConfigError for a value of a wrong type or out of range, or when no model is named."""
    return _convert(_engine(sections), EngineConfig)


def serve_config(sections: Sections) -> ServeConfig:
    """As `engine_config`."""
    return _convert({**sections.get("serve", {}), "engine": _engine(sections)}, ServeConfig)


def _engine(sections: Sections) -> Sections:
    if "model" not in sections.get("model", {}):
        raise ConfigError(
            "no model: name one on the command line, or as `model` under [model] in the configuration file"
        )
    return {section: sections.get(section, {}) for section in _ENGINE}


def _convert(values: Mapping[str, Any], config: type[_Config]) -> _Config:
    try:
        return msgspec.convert(values, config)
    except msgspec.ValidationError as error:
        place, problem = refused_setting(error, config)
        setting = place.removeprefix("engine.")
        raise ConfigError(f"{setting if '.' in setting else f'serve.{setting}'}: {problem}") from None


def check_name(where: str, name: str, valid: Iterable[str]) -> None:
    valid = list(valid)
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
        raise ConfigError(f"{where}: {name}: there is no such setting; the nearest is {near[0]}")
