"""What msgspec says of a setting that it refuses, in the words of our own errors."""

import enum
from types import NoneType
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
    alternatives = [each for each in get_args(kind) if each is not NoneType]
    for each in [kind] if get_origin(kind) is Literal or isinstance(kind, type) else alternatives:
        if get_origin(each) is Literal:
            return list(get_args(each))
        if isinstance(each, type) and issubclass(each, enum.Enum):
            return [member.value for member in each]
    return []
