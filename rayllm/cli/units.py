"""Sizes and counts as people write them: `80GB`, `1GiB`, `175e9`, `7B`."""

import math
import re

import typer

_BYTES = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """`80GB` is 80 * 10**9 bytes, `80GiB` is 80 * 2**30; a bare number is bytes."""
    return _parse(text, _BYTES, "a size such as 80GB, 512MiB or 1000000 (bytes)")


def parse_count(text: str) -> int:
    """`175e9`, `175B` and `175000000000` are the same count."""
    return _parse(text, _COUNTS, "a count such as 175e9, 7B or 135M")


def parse_share(text: str) -> float:
    """`10%` is 0.1."""
    match = _NUMBER.fullmatch(text.removesuffix("%"))
    share = float(match[1]) / 100 if match and not match[2] and text.endswith("%") else math.nan
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text!r} is not a share such as 10%")
    return share


def format_bytes(num_bytes: float) -> str:
    """In decimal units, as GPU vendors count: `350 GB`, `23.04 kB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.4g} {unit}" if num_bytes < 1e4 * size else f"{num_bytes / size:,.0f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _parse(text: str, units: dict[str, int], expected: str) -> int:
    match = _NUMBER.fullmatch(text)
    factor = {name.lower(): size for name, size in units.items()}.get(match[2].lower()) if match else None
    value = float(match[1]) * factor if match and factor is not None else math.nan
    if not 1 <= value < 1e18:
        raise typer.BadParameter(f"{text!r} is not {expected}")
    return round(value)
