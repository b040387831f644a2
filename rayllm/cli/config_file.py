"""The engine's configuration in a TOML file: a table for each part of `EngineConfig`.

[model]
model = "smollm2-135m"
dtype = "bfloat16"

[parallel]
tensor = 3

[cache]
cpu_memory_bytes = 1073741824

[scheduler]
max_num_seqs = 64
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.core.errors import ConfigError

Sections = dict[str, dict[str, Any]]

_SECTIONS = {"model": ModelConfig, "parallel": ParallelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}


def read_config(path: Path) -> Sections:
    """The file's tables, names checked, values not yet. Raises ConfigError that names the file and the key."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    for section, values in tables.items():
        _check_name(path, section, _SECTIONS)
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section}: must be a table, [{section}]")
        for name in values:
            _check_name(
                path,
                f"{section}.{name}",
                [f"{section}.{field.name}" for field in dataclasses.fields(_SECTIONS[section])],
            )
    return tables


def engine_config_from(sections: Mapping[str, Mapping[str, Any]]) -> EngineConfig:
    """Raises ConfigError for a value of a wrong type or out of range, or when no model is named."""
    if "model" not in sections.get("model", {}):
        raise ConfigError(
            "no model: name one on the command line, or as `model` under [model] in the configuration file"
        )
    parts = {name: _build(name, cls, sections.get(name, {})) for name, cls in _SECTIONS.items()}
    return EngineConfig(**parts)


def _build(section: str, cls: type, values: Mapping[str, Any]) -> Any:
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise ConfigError(f"[{section}] {error}") from None


def _check_name(path: Path, name: str, valid: Iterable[str]) -> None:
    valid = list(valid)
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
        raise ConfigError(f"{path}: {name}: there is no such setting; the nearest is {near[0]}")
