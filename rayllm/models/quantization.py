"""How an int8 checkpoint says so: the `quantization_config` of config.json in the compressed-tensors layout.

Two schemes of one scale per output: W8A16 (weights alone) and W8A8 (activations too, row by row as they come).
Everything else is refused by name. Knows nothing of torch; reads no file.

`mixed` checkpoints add the file `OUTLIERS`, named in config.json under `OUTLIERS_FIELD`: for a linear layer X the
columns of its input that are outliers (`X.outlier_columns`, int32 [J]) and the weights of 16 bits for them
(`X.outlier_weight`, [N, J]). The int8 weight holds those columns as well, and the rest of config.json describes W8A16:
a reader who does not know of the file has every weight, and rounds no activation, which such columns would spoil. Who
knows of it has W8A8. Where int8 cannot hold both those columns and the rest it is cut at the range of the rest, and
the checkpoint is of a format of our own (`OWN_FORMAT`), so that others refuse it instead of answering nonsense.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rayllm.core.errors import ConfigError

Scheme = Literal["w8a8", "w8a16"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
METHOD = "compressed-tensors"
OWN_FORMAT = "rayllm-mixed"  # pack-quantized, but useless without the file of outliers
FORMATS = {"int-quantized": False, "pack-quantized": True, OWN_FORMAT: True}
HEAD = "lm_head"
OUTLIERS = "outliers.safetensors"
OUTLIERS_FIELD = "int8_outliers"

_WEIGHTS: Mapping[str, object] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
_ACTIVATIONS: Mapping[str, object] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Format:
    """How one linear layer is stored; `packed`: four weights to an int32 [N, K / 4], each plus 128."""

    scheme: Scheme
    packed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """`groups`: patterns of layers and their format, the first that fits counts; `ignore`: patterns of the others."""

    groups: tuple[tuple[tuple[str, ...], Int8Format], ...]
    ignore: tuple[str, ...]
    has_outliers: bool = False

    def of(self, module: str) -> Int8Format | None:
        """`module`: the name of a linear layer in the checkpoint, such as model.layers.0.mlp.up_proj."""
        if any(_fits(pattern, module) for pattern in self.ignore):
            return None
        fitting = (form for patterns, form in self.groups if any(_fits(pattern, module) for pattern in patterns))
        return next(fitting, None)


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """None where config.json has none. Raises ConfigError for a field that is not supported."""
    fields = config.get("quantization_config")
    if fields is None:
        return None
    fields = _mapping(fields, "")
    if fields.get("quant_method") != METHOD:
        raise _refusal("quant_method", fields.get("quant_method"), METHOD)
    form = fields.get("format")
    if form not in FORMATS:
        raise _refusal("format", form, ", ".join(FORMATS))
    if form == OWN_FORMAT and config.get(OUTLIERS_FIELD) is None:
        raise ConfigError(f"config.json: {OUTLIERS_FIELD} is missing, without which {OWN_FORMAT} cannot be read")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if fields.get(name):
            raise _refusal(name, fields[name], "none")
    has_outliers = config.get(OUTLIERS_FIELD) is not None
    groups = []
    for name, group in _mapping(fields.get("config_groups"), "config_groups").items():
        patterns, stored = _group(name, _mapping(group, f"config_groups.{name}"), form)
        groups.append((patterns, replace(stored, scheme="w8a8") if has_outliers else stored))
    return Quantization(
        groups=tuple(groups), ignore=_patterns(fields.get("ignore") or [], "ignore"), has_outliers=has_outliers
    )


def stored_format(scheme: Scheme, *, outliers: bool) -> Int8Format:
    """How layers that are int8 by `scheme` are stored, and described to others; `outliers`: some columns lie apart."""
    return Int8Format(scheme="w8a16" if outliers else scheme, packed=outliers or scheme == "w8a16")


def write_quantization(stored: Int8Format, *, ignore: Sequence[str], needs_outliers: bool = False) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear layers, but for `ignore`, are int8 as `stored`.

    `needs_outliers`: what int8 holds of outlier columns is cut. An int8 head is named: to vLLM and SGLang it is none of
    the `Linear` layers.
    """
    form = "pack-quantized" if stored.packed else "int-quantized"  # what vLLM looks for in either case
    form = OWN_FORMAT if needs_outliers else form
    group = {
        "targets": ["Linear"] if HEAD in ignore else ["Linear", HEAD],
        "format": form,
        "weights": dict(_WEIGHTS),
        "input_activations": dict(_ACTIVATIONS) if stored.scheme == "w8a8" else None,
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": form,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def _group(name: str, group: Mapping[str, Any], default_format: str) -> tuple[tuple[str, ...], Int8Format]:
    where = f"config_groups.{name}"
    form = group.get("format") or default_format
    if form not in FORMATS:
        raise _refusal(f"{where}.format", form, ", ".join(FORMATS))
    _expect(group.get("weights"), _WEIGHTS, f"{where}.weights")
    activations = group.get("input_activations")
    if activations is not None:
        _expect(activations, _ACTIVATIONS, f"{where}.input_activations")
    if group.get("output_activations") is not None:
        raise _refusal(f"{where}.output_activations", group["output_activations"], "none")
    scheme: Scheme = "w8a16" if activations is None else "w8a8"
    return _patterns(group.get("targets"), f"{where}.targets"), Int8Format(scheme=scheme, packed=FORMATS[form])


def _expect(given: object, wanted: Mapping[str, object], where: str) -> None:
    fields = _mapping(given, where)
    for name, value in wanted.items():
        if fields.get(name) != value:
            raise _refusal(f"{where}.{name}", fields.get(name), value)
    for name in ("group_size", "block_structure", "actorder"):
        if fields.get(name):
            raise _refusal(f"{where}.{name}", fields[name], "none")


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: quantization_config{'.' * bool(where)}{where}: {value!r} is not an object")
    return value


def _patterns(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"config.json: quantization_config.{where}: {value!r} is not a list of strings")
    for pattern in value:
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"config.json: quantization_config.{where}: {pattern!r}: {error}") from None
    return tuple(value)


def _fits(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern in (module, "Linear")


def _refusal(field: str, value: object, supported: object) -> ConfigError:
    return ConfigError(f"config.json: quantization_config.{field}: {value!r} is not supported (supported: {supported})")
