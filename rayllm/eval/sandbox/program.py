"""The tested code's side: runs it, then does what the tests ask of it, one request at a time.

All of this is in the hands of the tested code; nothing here decides anything.
"""

import builtins
from typing import Any

from rayllm.eval.sandbox.wire import Channel, decode, encode

READY = "ready"


def serve_program(channel: Channel, source: str) -> None:
    """Answers with ["value", ...] or ["raised", type, text] until the other end is gone."""
    program = _Program()
    channel.send(READY)
    channel.send(program.answer("run", source))
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(program.answer(*request))


class _Program:
    def __init__(self) -> None:
        self._names: dict[str, Any] = {"__builtins__": builtins}  # as lm-eval's exec: `__name__` is "builtins"
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def answer(self, operation: str, *arguments: Any) -> list[Any]:
        try:
            result = getattr(self, f"_{operation}")(
                *(decode(argument, self._objects.__getitem__) for argument in arguments)
            )
            return ["value", encode(result, self._refer)]
        except BaseException as error:  # noqa: BLE001 - whatever the tested code raises is an answer
            return ["raised", type(error).__name__, str(error)[:1000]]

    def _refer(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)  # and so its id is nobody else's
        return number

    def _run(self, source: str) -> None:
        exec(compile(source, "<program>", "exec"), self._names)

    def _name(self, name: str) -> Any:
        if name not in self._names:
            raise NameError(f"name {name!r} is not defined")
        return self._names[name]

    def _call(self, function: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        return function(*arguments, **keywords)

    def _attribute(self, value: Any, name: str) -> Any:
        return getattr(value, name)

    def _iterator(self, value: Any) -> Any:
        return iter(value)

    def _next(self, value: Any) -> Any:
        return next(value)

    def _length(self, value: Any) -> int:
        return len(value)

    def _item(self, value: Any, key: Any) -> Any:
        return value[key]

    def _truth(self, value: Any) -> bool:
        return bool(value)
