"""The tests' side: runs them against a program in another process, and says whether they all passed.

Of the program the tests see what the problem asks for, and nothing else: helpers are the problem's own, and a program
that redefines `abs` or `len` has redefined its own.
"""

import builtins
from collections.abc import Callable, Collection
from typing import Any

from rayllm.eval.sandbox.program import READY
from rayllm.eval.sandbox.wire import Channel, decode, encode

ENDED = "the program ended itself"


class ProgramError(BaseException):
    """The program cannot go on, or raised what is no Exception (SystemExit); tests do not catch it as one."""


class _Lost(ProgramError):
    """The program's process is gone, or does not speak our language."""


class Program:
    """The tested code as the tests see it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._remotes: dict[int, Remote] = {}
        self.is_lost = False

    def wait_until_ready(self) -> bool:
        """False where the program's process ended before any tested code ran: no fault of that code."""
        try:
            return bool(self._channel.receive() == READY)
        except EOFError:
            return False

    def wait_until_run(self) -> None:
        """Until its top level is done; raises what that raised."""
        self._answer()

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Raises what the program raises, as a builtin exception of the same name or an Exception."""
        message = [operation, *(encode(argument, self._number) for argument in arguments)]
        try:
            self._channel.send(message)
        except EOFError:
            raise self._lose(ENDED) from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, *content = self._channel.receive()
            if kind == "value":
                return decode(content[0], self._remote)
            name, text = map(str, content)
        except EOFError:
            raise self._lose(ENDED) from None
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise self._lose(f"the program's answer cannot be read: {_describe(error)}") from None
        raise _exception(name, text)

    def _lose(self, reason: str) -> _Lost:
        self.is_lost = True
        return _Lost(reason)

    def _remote(self, number: int) -> "Remote":
        if not isinstance(number, int):
            raise TypeError("a reference is a number")
        return self._remotes.setdefault(number, Remote(self, number))

    def _number(self, value: Any) -> int:
        if not isinstance(value, Remote):
            raise TypeError(f"a {type(value).__name__} cannot be given to the program")
        number: int = object.__getattribute__(value, "_number")
        return number


class Remote:
    """An object of the program that is no plain data: a function, an instance, an iterator. Equal only to itself."""

    def __init__(self, program: Program, number: int) -> None:
        self._program = program
        self._number = number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._program.ask("call", self, list(arguments), keywords)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("attribute", self, name)

    def __iter__(self) -> Any:
        return self._program.ask("iterator", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)

    def __len__(self) -> int:
        return int(self._program.ask("length", self))

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self, key)

    def __bool__(self) -> bool:
        return bool(self._program.ask("truth", self))


class _Names(dict[str, Any]):
    """The tests' global names: their own, then the program's that they may see, then Python's."""

    def __init__(self, visible: Collection[str], look_up: Callable[[str], Any]) -> None:
        super().__init__({"__builtins__": builtins})
        self._visible = visible
        self._look_up = look_up

    def __missing__(self, name: str) -> Any:
        if name not in self._visible:
            raise KeyError(name)
        return self._look_up(name)


def judge(program: Program, *, setup: str, tests: str, names: Collection[str]) -> str | None:
    """None if all passed; otherwise what went wrong. `setup` is what the problem itself gives."""
    try:
        program.wait_until_run()
    except ProgramError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it raised, it failed
        return f"the program raised {_describe(error)}"
    globals_ = _Names(names, lambda name: program.ask("name", name))
    try:
        exec(compile(setup, "<setup>", "exec"), globals_)
        exec(compile(tests, "<tests>", "exec"), globals_)
    except ProgramError as error:
        return str(error)
    except AssertionError as error:
        return f"a test failed: {_describe(error)}"
    except BaseException as error:  # noqa: BLE001 - a test that does not end well has not passed
        return f"a test raised {_describe(error)}"
    return ENDED if program.is_lost else None


def _exception(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # a UnicodeDecodeError wants more than a text
            return Exception(f"{name}: {text}")
    if isinstance(kind, type) and issubclass(kind, BaseException):
        return ProgramError(f"the program raised {name}")
    return Exception(f"{name}: {text}")


def _describe(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
