"""Typed reading of a config.json that nobody has checked yet.

A value of the wrong type or range is a `ConfigError` that names the field and the value. Knows no family.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from rayllm.core.errors import ConfigError


class ConfigFields:
    """One object of a config.json. `prefix` is where it lies, for messages ("rope_parameters.")."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, name: str) -> Any:
        """The raw value; null and missing are the same."""
        return self._values.get(name)

    def is_null(self, name: str) -> bool:
        """Present and null, which some families tell from missing."""
        return name in self._values and self._values[name] is None

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.unsupported(name, f"must be an integer of at least {low}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.unsupported(name, "must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self.unsupported(name, "must be true or false")
        return value

    def choice(self, name: str, supported: Collection[str], default: str | None = None) -> str:
        value = self._required(name, default)
        if not isinstance(value, str) or value not in supported:
            raise self.unsupported(name, f"is not supported (supported: {', '.join(sorted(supported))})")
        return value

    def section(self, name: str) -> "ConfigFields | None":
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.unsupported(name, "must be an object")
        return ConfigFields(value, f"{self._prefix}{name}.")

    def refuse_unless(self, name: str, *allowed: object) -> None:
        """`name` may be missing, null or one of `allowed`: other values change the model in a way we do not compute."""
        value = self.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise self.unsupported(name, "is not supported")

    def refuse_unknown(self, known: Collection[str]) -> None:
        for name in self._values:
            if name not in known:
                raise self.unsupported(name, f"is not supported (supported fields: {', '.join(sorted(known))})")

    def unsupported(self, name: str, problem: str) -> ConfigError:
        text = repr(self._values.get(name))
        return ConfigError(f"config.json: {self._prefix}{name}: {text[:80]} {problem}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"config.json: {self._prefix}{name}: is missing")
        return default
