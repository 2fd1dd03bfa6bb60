# SPDX-License-Identifier: Apache-2.0
"""A program and its tests in two processes: calls, results and exceptions as lines of JSON over two pipes.

`ProgramSide` answers in the program's process; `ChecksSide` asks in the other. The tests see the program's functions and
objects as `Handle`s. What decides a test stays with the tests: plain values are compared there, and a handle is never
compared or combined with a value of the tests, since the program would be told what is expected of it.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from . import values

_MOST_BYTES = 64 << 20  # of one message
_MOST_TEXT = 500  # characters of an error
SOLUTION = "solution.py"  # the program's name in its own tracebacks
_SHARED_ATTRIBUTES = ("__name__", "__qualname__", "__doc__", "__dict__")
_UNARY: dict[str, Callable[[Any], Any]] = {
    **{
        f"__{name}__": vars(builtins)[name]
        for name in ["iter", "next", "len", "bool", "str", "repr", "hash", "float", "int", "abs", "reversed"]
    },
    **{f"__{name}__": vars(operator)[name] for name in ["index", "neg", "pos", "invert"]},
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    f"__{name.rstrip('_')}__": vars(operator)[name]
    for name in [
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "add",
        "sub",
        "mul",
        "matmul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and_",
        "or_",
        "xor",
    ]
}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **_UNARY,
    **_BINARY,
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "get attribute": getattr,
    "set attribute": setattr,
    "get item": operator.getitem,
    "set item": operator.setitem,
    "is instance": lambda kind, value: isinstance(value, kind),
}


class Gone(BaseException):
    """The other process has ended, or sends what is no message. No `except Exception` of a test may swallow it."""


class ProgramExit(BaseException):
    """The program raised SystemExit or another exception that ends a process; it must not end the tests'."""


class Channel:
    """Messages, one JSON object a line, in two directions."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._buffer = bytearray()
        self.broken = ""  # why, once nothing more can come

    def send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode("ascii") + b"\n")
        if len(data) > _MOST_BYTES:
            raise ValueError(f"a value of more than {_MOST_BYTES >> 20} MiB cannot be handed over")
        try:
            while data:
                data = data[os.write(self._outgoing, data) :]
        except OSError:
            raise self._gone("") from None

    def receive(self) -> dict[str, Any]:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            chunk = os.read(self._incoming, 1 << 16)
            if not chunk:
                raise self._gone("")
            self._buffer += chunk
            if len(self._buffer) > _MOST_BYTES:
                raise self._gone("sent more than a message may hold")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self._gone("wrote to the pipe of its results")
        return message

    def _gone(self, reason: str) -> Gone:
        self.broken = self.broken or reason or "ended"
        return Gone(self.broken)


class _Side(ABC):
    """What both sides do: ask, and answer what is asked meanwhile."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.channel.send(message)
        while "ask" in (reply := self.channel.receive()):
            self.reply(reply)
        return reply

    def reply(self, message: dict[str, Any]) -> None:
        try:
            answer = self.answer(message)
            self.channel.send(answer)
        except Gone:
            raise
        except BaseException as error:  # SystemExit and KeyboardInterrupt are results, too
            raised = describe(error)
            error.__traceback__ = None  # may hold most of the memory
            self.channel.send({"raised": raised})

    @abstractmethod
    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the other side gets for its question."""

    def encode(self, value: Any) -> Any:
        return values.encode(value, self.refer)

    def decode(self, data: Any) -> Any:
        return values.decode(data, self.resolve)

    @abstractmethod
    def refer(self, value: Any) -> dict[str, Any]:
        """A handle for an object that stays on this side."""

    @abstractmethod
    def resolve(self, data: dict[str, Any]) -> Any:
        """The object that a handle of this side names, or a stand-in for one of the other side."""


class ProgramSide(_Side):
    """The program's side: runs it, then does what the tests ask of its objects."""

    def __init__(self, channel: Channel, program: str) -> None:
        super().__init__(channel)
        self._program = program
        self.module = types.ModuleType("solution")  # not __main__: a `main()` at the end of an answer does not run
        self._numbers: dict[int, int] = {}
        self._objects: list[Any] = []

    def serve(self) -> None:
        """Until the tests have ended."""
        try:
            while True:
                self.reply(self.channel.receive())
        except Gone:
            return

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["ask"] == "run":
            exec(compile(self._program, SOLUTION, "exec", dont_inherit=True), self.module.__dict__)
            return {"value": None}
        if message["ask"] == "name":
            return self._named(message["name"])
        before, names = message["args"], message["names"]
        args = self.decode(before)
        plain = len(args) - len(names)
        value = _OPERATIONS[message["ask"]](*args[:plain], **dict(zip(names, args[plain:], strict=True)))
        after = [self.encode(argument) if _holds(data) else data for argument, data in zip(args, before, strict=True)]
        return {"value": self.encode(value), **({"args": after} if after != before else {})}

    def _named(self, name: str) -> dict[str, Any]:
        found = vars(self.module).get(name, self)
        if found is self:
            return {"missing": True}
        return {"module": found.__name__} if isinstance(found, types.ModuleType) else {"value": self.encode(found)}

    def refer(self, value: Any) -> dict[str, Any]:
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)  # kept for good, so that its id stays its own
        return {"handle": number}

    def resolve(self, data: dict[str, Any]) -> Any:
        if "handle" in data:
            return self._objects[data["handle"]]
        number = data["callback"]
        return lambda *args, **kwargs: self._call_back(number, args, kwargs)

    def _call_back(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reply = self.ask({"ask": number, "args": self.encode([*args]), "kwargs": self.encode(kwargs)})
        if "raised" in reply:
            raise _exception(reply["raised"])
        return self.decode(reply["value"])


def _holds(data: Any) -> bool:
    """Whether an argument may be changed by the function that gets it."""
    return isinstance(data, list) or (isinstance(data, dict) and "kind" in data and data["kind"] != "builtins.int")


class ChecksSide(_Side):
    """The tests' side. Handles of one object are one handle."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._handles: dict[int, Handle] = {}
        self._callbacks: list[Callable[..., Any]] = []

    def run(self) -> None:
        """Let the program run to its end; raises what it raises."""
        self._value(self.ask({"ask": "run"}))

    def name(self, name: str) -> Any:
        """The value of a global name of the program; NameError if it has none."""
        reply = self.ask({"ask": "name", "name": name})
        # The tests may use a module that only the program imported. It is theirs, not the program's idea of it.
        if reply.get("module") == name and name in sys.stdlib_module_names:
            return importlib.import_module(name)
        if "missing" in reply or "module" in reply:
            raise NameError(f"name {name!r} is not defined")
        return self._value(reply)

    def perform(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        before = self.encode(given)
        reply = self.ask({"ask": operation, "args": before, "names": [*kwargs]})
        try:
            value = self._value(reply)
        except StopIteration as error:
            if operation == "__next__":
                raise
            # map, zip and the like would take it for the end of the cases that they go through.
            raise _exception({**vars(error)["described"], "classes": ["RuntimeError"]}) from None
        if "args" in reply:
            self._restore(given, before, reply["args"])
        return value

    def _restore(self, given: list[Any], before: list[Any], after: Any) -> None:
        """Change the arguments that the program has changed: one that it got twice has two copies there."""
        for one, was, now in zip(given, before, after if isinstance(after, list) else (), strict=False):
            if now != was:
                values.restore(one, self._trusting_nothing(now))

    def _value(self, reply: dict[str, Any]) -> Any:
        if "raised" in reply:
            raise _exception(reply["raised"])
        return self._trusting_nothing(reply.get("value"))

    def _trusting_nothing(self, data: Any) -> Any:
        try:
            return self.decode(data)
        except Exception as error:  # decoders meet whatever the program has written
            raise TypeError(f"the program returned what cannot be read: {error}") from None

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Call a function that a test has passed to the program."""
        function = self._callbacks[message["ask"]]
        args, kwargs = self.decode(message["args"]), self.decode(message["kwargs"])
        return {"value": self.encode(function(*args, **kwargs))}

    def refer(self, value: Any) -> dict[str, Any]:
        if type(value) is Handle:
            return {"handle": object.__getattribute__(value, "number")}
        if isinstance(value, Iterator):
            return values.encode_iterator(value, self.refer)
        if callable(value):
            self._callbacks.append(value)
            return {"callback": len(self._callbacks) - 1}
        raise TypeError(f"a value of type {type(value).__name__} cannot be handed to a program")

    def resolve(self, data: dict[str, Any]) -> Any:
        return self._handles.setdefault(int(data["handle"]), Handle(self, int(data["handle"])))


class Handle:
    """An object of the program, for its tests. Equal only to itself, unless two of the program's own are compared."""

    __slots__ = ("number", "tester")

    def __init__(self, tester: ChecksSide, number: int) -> None:
        object.__setattr__(self, "tester", tester)
        object.__setattr__(self, "number", number)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Handle
        # Libraries look for protocols by such names, and would believe what they are told.
        if name.startswith("__") and name not in _SHARED_ATTRIBUTES:
            raise AttributeError(f"{name} of a program's object is not available to tests")
        return _perform("get attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _perform("set attribute", self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _perform("call", self, *args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return _perform("get item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _perform("set item", self, key, value)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Handle) and bool(_perform("is instance", self, value))


def _perform(operation: str, handle: Handle, *args: Any, **kwargs: Any) -> Any:
    tester: ChecksSide = object.__getattribute__(handle, "tester")
    return tester.perform(operation, handle, *args, **kwargs)


def _unary(operation: str) -> Callable[[Handle], Any]:
    return lambda self: _perform(operation, self)


def _binary(operation: str) -> Callable[[Handle, Any], Any]:
    return lambda self, other: _perform(operation, self, other) if type(other) is Handle else NotImplemented


for _operation in _UNARY:
    setattr(Handle, _operation, _unary(_operation))
for _operation in _BINARY:
    setattr(Handle, _operation, _binary(_operation))


def describe(error: BaseException, file: str = SOLUTION) -> dict[str, Any]:
    """An exception as JSON: its built-in classes, from the nearest on, its text, and the line of `file` that raised it.

    Nothing here may fail, whatever the program's exceptions do when they are looked at.
    """
    name = type(error).__name__
    try:
        text = f"{name}: {str(error)[:_MOST_TEXT]}"
    except BaseException:
        text = name
    classes = [kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind]
    line, step = 0, error.__traceback__
    while step is not None:  # no list of all frames: there may be millions
        line = step.tb_lineno if step.tb_frame.f_code.co_filename == file else line
        step = step.tb_next
    return {"classes": classes, "text": text, "line": line}


def _exception(raised: Any) -> BaseException:
    """The nearest built-in exception to one that another process describes; `described` keeps the description."""
    raised = raised if isinstance(raised, dict) else {}
    names, text = raised.get("classes"), str(raised.get("text"))[: 2 * _MOST_TEXT]
    error: BaseException = ProgramExit(text)
    for name in names if isinstance(names, list) else ():
        kind = vars(builtins).get(str(name))
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(text.partition(": ")[2])
            except TypeError:  # some take more than a text; the next class does not
                continue
            break
    error.described = raised  # type: ignore[attr-defined]
    return error
