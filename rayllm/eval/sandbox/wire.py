"""Values between the tests and the tested code: plain data by value, everything else by reference, never code.

The two live in different processes, so tested code can neither see the tests nor end them. What it returns arrives as
the plain value that it is equal to: a Counter as a dict, a named tuple as a tuple. An object of a class of its own is
a reference that equals nothing but itself, whatever its `__eq__` would say.
"""

import json
import socket
import struct
from collections.abc import Callable, Set
from typing import Any

MAX_FRAME_BYTES = 64 << 20

_LENGTH = struct.Struct(">I")
_EXACT_IN_JSON = 1 << 53


class Channel:
    """Frames of JSON over a stream socket. EOFError where the other end is gone, ValueError for a frame too long."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: object) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_FRAME_BYTES:
            raise ValueError(f"a value of {len(data)} bytes")
        try:
            self._connection.sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            raise EOFError from None

    def receive(self) -> Any:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a value of {length} bytes")
        return json.loads(self._read(length))

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = self._connection.recv(min(length - len(data), 1 << 20))
            except OSError:
                piece = b""
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """JSON for `value`; `refer` gives a number to whatever has no value of its own."""

    def each(items: Any) -> list[Any]:
        return [encode(item, refer) for item in items]

    match value:
        case None | bool():
            return value
        case int():
            return int(value) if abs(value) < _EXACT_IN_JSON else {"int": hex(value)}
        case str():
            return str.__str__(value)
        case float():
            number = float(value)
            return number if number - number == 0 else {"float": repr(number)}
        case complex():
            return {"complex": [repr(value.real), repr(value.imag)]}
        case bytes() | bytearray():
            return {"bytes": value.hex()}
        case list():
            return each(value)
        case tuple():
            return {"tuple": each(value)}
        case dict():
            return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
        case frozenset():
            return {"frozenset": each(value)}
        case Set():
            return {"set": each(value)}
    kind = type(value)
    match kind.__module__, kind.__name__:
        case "fractions", "Fraction":
            return {"fraction": str(value)}
        case "decimal", "Decimal":
            return {"decimal": str(value)}
        case "numpy", _ if hasattr(value, "dtype") and not value.shape:
            return encode(value.item(), refer)
    return {"ref": refer(value)}


def decode(data: Any, dereference: Callable[[int], Any]) -> Any:
    """ValueError, TypeError, LookupError, ArithmeticError or RecursionError for what `encode` does not write."""

    def each(items: Any) -> Any:
        return (decode(item, dereference) for item in items)

    if isinstance(data, list):
        return list(each(data))
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    match kind:
        case "int":
            return int(content, 16)
        case "float":
            return float(content)
        case "complex":
            return complex(*map(float, content))
        case "bytes":
            return bytes.fromhex(content)
        case "tuple":
            return tuple(each(content))
        case "dict":
            return {decode(key, dereference): decode(item, dereference) for key, item in content}
        case "set":
            return set(each(content))
        case "frozenset":
            return frozenset(each(content))
        case "fraction":
            from fractions import Fraction

            return Fraction(content)
        case "decimal":
            from decimal import Decimal

            return Decimal(content)
        case "ref":
            return dereference(content)
    raise ValueError(f"no value is called {kind!r}")
