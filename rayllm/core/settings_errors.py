"""What msgspec says of a setting that it refuses, in the words of our own errors."""

from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec


def refused_setting(error: msgspec.ValidationError, config: type) -> tuple[str, str]:
    """-> (its place as TABLE.NAME, empty for the whole; the problem). `config`: the dataclass that was to be made."""
    problem, _, place = str(error).partition(" - at `$.")
    place = place.rstrip("`")
    if problem.startswith("Invalid enum value") and (choices := _choices(config, place)):
        problem += f"; it is one of {', '.join(map(str, choices))}"
    return place, problem[:1].lower() + problem[1:]


def _choices(config: type, place: str) -> list[Any]:
    """Empty where the place is not that of a field, such as one in a list."""
    kind: Any = config
    for name in place.split("."):
        kind = get_type_hints(kind).get(name) if isinstance(kind, type) else None
    alternatives = (kind, *get_args(kind))  # of a union
    return next((list(get_args(each)) for each in alternatives if get_origin(each) is Literal), [])
