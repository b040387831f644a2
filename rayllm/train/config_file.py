"""A `TrainConfig` from a TOML file, whose tables are its parts, and from settings given as `a.b=c`.

run = "runs/tiny"

[model]
start = "smollm2-135m"

[batch]
sequence_length = 512
tokens = 32768

A value on the command line is TOML too; what is no TOML (a bare word, a path) is a string, and so is all of a setting
that is one.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from rayllm.core.errors import ConfigError
from rayllm.core.settings_errors import refused_setting
from rayllm.train.config import TrainConfig


def read_train_config(path: Path, settings: Iterable[str] = ()) -> TrainConfig:
    """`settings` win over the file. Raises ConfigError that names the file or setting, the key, and what is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    _check_names(values, TrainConfig, str(path))
    for setting in settings:
        _merge(values, _parse(setting))
    return _convert(values)


def _parse(setting: str) -> dict[str, Any]:
    """a.b=c -> {"a": {"b": c}}"""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting}: must be NAME=VALUE, such as optimizer.learning_rate=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    names = key.strip().split(".")
    if _type_of(names) is str and not isinstance(value, str):
        value = text
    for name in reversed(names):
        value = {name: value}
    _check_names(value, TrainConfig, "--set")
    return dict(value)


def _type_of(names: Iterable[str]) -> object:
    """Of the setting that `names` lead to; None if there is none."""
    kind: Any = TrainConfig
    for name in names:
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _check_names(values: Mapping[str, Any], config: type, origin: str, prefix: str = "") -> None:
    types = get_type_hints(config)
    for name, value in values.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{origin}: {prefix}{name}: there is no such setting; the nearest is {prefix}{near}")
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: {prefix}{name}: must be a table, [{prefix}{name}]")
            _check_names(value, types[name], origin, f"{prefix}{name}.")


def _convert(values: Mapping[str, Any]) -> TrainConfig:
    try:
        return msgspec.convert(values, TrainConfig)
    except msgspec.ValidationError as error:
        place, problem = refused_setting(error, TrainConfig)
        raise ConfigError(f"{place}: {problem}" if place else problem) from None
