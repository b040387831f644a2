"""The configuration in a TOML file: a table for each part of `EngineConfig`, and one for `ServeConfig`.

[model]
model = "smollm2-135m"
dtype = "bfloat16"

[parallel]
tensor = 3

[cache]
cpu_memory_bytes = 1073741824

[scheduler]
max_num_seqs = 64

[serve]
http_port = 8000
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.core.errors import ConfigError
from rayllm.serve.config import ServeConfig

Sections = dict[str, dict[str, Any]]
_Config = TypeVar("_Config")

_ENGINE = {"model": ModelConfig, "parallel": ParallelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}


def read_config(path: Path) -> Sections:
    """The file's tables, names checked, values not yet. Raises ConfigError that names the file and the key."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    valid = {section: [field.name for field in dataclasses.fields(config)] for section, config in _ENGINE.items()}
    valid["serve"] = [field.name for field in dataclasses.fields(ServeConfig) if field.name != "engine"]
    for section, values in tables.items():
        _check_name(path, section, valid)
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section}: must be a table, [{section}]")
        for name in values:
            _check_name(path, f"{section}.{name}", [f"{section}.{each}" for each in valid[section]])
    return tables


def merge(file: Sections, given: Sections) -> Sections:
    """What is given on the command line (not None) wins over the file."""
    return {
        section: file.get(section, {})
        | {name: value for name, value in given.get(section, {}).items() if value is not None}
        for section in {*file, *given}
    }


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
        problem, _, path = str(error).partition(" - at `$.")
        setting = path.rstrip("`").removeprefix("engine.")
        raise ConfigError(f"{setting if '.' in setting else f'serve.{setting}'}: {problem.lower()}") from None


def _check_name(path: Path, name: str, valid: Iterable[str]) -> None:
    valid = list(valid)
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
        raise ConfigError(f"{path}: {name}: there is no such setting; the nearest is {near[0]}")
