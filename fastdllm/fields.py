# SPDX-License-Identifier: Apache-2.0
"""What an option is, read off its annotation: `depth: Annotated[int, "Branches per row.", Bounds(low=1)] = 4`.

The annotation carries the type, the one line that documents the option, and its bounds. Options of `DecodeConfig` and the
fields of decoders and caches are declared in this way; checks, command lines and the pages of docs/ read them from here.
"""

from __future__ import annotations

import inspect
import math
import operator
import types
import typing
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Number
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """What values an option may have.

    low, high: the smallest and the largest number; None for no bound.
    above: numbers must exceed `low`.
    choices: the allowed names, or a function that returns them.
    at_most: another option that the number must not exceed; it is known only when the model is.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    at_most: str = ""

    def allowed(self) -> tuple[str, ...]:
        return tuple(self.choices() if callable(self.choices) else self.choices)

    def __str__(self) -> str:
        if names := self.allowed():
            return ", ".join(names)
        if self.low is not None and self.high is not None:
            return f"{'(' if self.above else '['}{self.low}, {self.high}]"
        if self.low is not None:
            return f"{'above' if self.above else 'at least'} {self.low}"
        return f"at most `{self.at_most}`" if self.at_most else ""

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, with what is allowed, when `value` lies outside."""
        if (names := self.allowed()) and value not in names:
            raise ValueError(f"{name}={shown(value)} is unknown; allowed are {', '.join(names)}")
        if self.low is not None and (value < self.low or (self.above and value == self.low)):
            raise ValueError(f"{name}={value} must {'lie in' if self.high is not None else 'be'} {self}")
        if self.high is not None and value > self.high:
            raise ValueError(f"{name}={value} must lie in {self}")


@dataclass(frozen=True)
class Option:
    """One option: its name, type (None among a union's members: it may be left open), default, documentation, bounds."""

    name: str
    kind: Any
    default: Any
    doc: str = ""
    bounds: Bounds = Bounds()

    @property
    def type_name(self) -> str:
        """The type in the words of a reader: "int", "name", "ids"."""
        kind = member(self.kind)
        if typing.get_origin(kind) is tuple:
            return "ids"
        if kind is Any:
            return "name or object" if self.bounds.choices else "function"
        return "name" if kind is str else kind.__name__


def read(owner: type) -> dict[str, Option]:
    """The options that a class declares: its annotated names that have a default."""
    if is_dataclass(owner):
        defaults = {f.name: f.default for f in fields(owner)}
    else:
        defaults = {name: vars(owner).get(name, MISSING) for name in owner.__annotations__}
    hints = typing.get_type_hints(owner, include_extras=True)
    return {name: _option(name, hints[name], value) for name, value in defaults.items() if value is not MISSING}


def _option(name: str, hint: Any, default: Any) -> Option:
    if typing.get_origin(hint) is not typing.Annotated:
        return Option(name, hint, default)
    kind, *notes = typing.get_args(hint)
    doc = next((note for note in notes if isinstance(note, str)), "")
    return Option(name, kind, default, doc, next((note for note in notes if isinstance(note, Bounds)), Bounds()))


LARGEST = 3e38  # decoding computes in fp32, where more is infinity
LEAST_TEMPERATURE = 1e-6  # above 0; logits divided by less overflow


def member(kind: Any) -> Any:
    """`kind`, or of a union with None its other member."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def shown(value: Any, most: int = 60) -> str:
    """`repr` for a message: one line, cut to `most` characters (somebody may hand over a tensor)."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of somebody's class; it must not hide what is wrong with the value
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as the declared type `kind` (int, float, bool, str, tuple[int, ...], or a union of one with None).

    Raises ValueError, with the type, for anything else; numbers must be finite in fp32, in which decoding computes.
    """
    if member(kind) is not kind:
        kind = member(kind)
        # lm-eval may hand over the text "None" for a number; for a text option "none" is a name (cache="none").
        if value is None or (kind is not str and isinstance(value, str) and value.lower() == "none"):
            return None
    try:
        if typing.get_origin(kind) is tuple:
            items = _items(value)
            return tuple(coerce(name, v, typing.get_args(kind)[0]) for v in items)
        if kind is bool:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return words[str(value).lower().removesuffix(".0")]
        if kind is int:
            return _int(value)
        # Not a number and infinity pass range checks, and end as masks that are never filled.
        if kind is float and not _is_flag(value) and math.isfinite(float(value)) and abs(float(value)) <= LARGEST:
            return float(value)
        if kind is str and isinstance(value, str):
            return value
    except Exception:  # whatever the conversions of somebody's class raise: torch's, of a tensor with two elements
        pass
    raise _mistyped(name, value, kind)


SCALARS = (int, float, bool, str)


def is_known(kind: Any) -> bool:
    """Whether `coerce` knows a declared type: a scalar, a tuple of any number of one, or a union of either with None."""
    members = [k for k in typing.get_args(kind) if k is not type(None)] if member(kind) is not kind else [kind]
    inner = typing.get_args(members[0])
    one = len(inner) == 2 and inner[1] is ... and typing.get_origin(members[0]) is tuple
    return len(members) == 1 and (inner[0] if one else members[0]) in SCALARS


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the declared type `kind`, where it was not read from a text: "4" is no int, a tensor of one number is one.

    Raises ValueError for anything else.
    """
    plain = member(kind)
    one = (typing.get_args(plain) or (plain,))[0]
    if one is not str and any(isinstance(v, str) for v in (value if isinstance(value, list | tuple) else [value])):
        raise _mistyped(name, value, plain)
    return coerce(name, value, kind)


class Declared(ABCMeta):
    """Of classes whose dataclass fields are options: an object is made from values of the types that its fields declare.

    A dataclass does not look at types: a window of 1.5 positions would fail far from where it was given, and the class's own
    checks, which compare numbers, with an error that names no option. Somebody's own class need not ask for it. Copies are
    not made anew, so that a rule may hold the rows' own numbers as columns (`DecoderRule.of`).
    """

    def __call__(cls, *args: Any, **given: Any) -> Any:
        order, declared = _declared(cls)

        def value_of(name: str, value: Any) -> Any:
            kind, default = declared.get(name, (None, MISSING))
            return value if kind is None or value is default else typed(name, value, kind)

        first = map(value_of, order, args)
        named = {name: value_of(name, value) for name, value in given.items()}
        return super().__call__(*first, *args[len(order) :], **named)


@cache
def _declared(owner: type) -> tuple[list[str], dict[str, tuple[Any, Any]]]:
    """How a dataclass is made: its positional parameters, and the type and default of each field whose type is known."""
    init: Any = owner.__init__  # type: ignore[misc]
    made = getattr(init, "__code__", None)  # by `dataclass`, which has no file; one of its own takes what it likes
    if not is_dataclass(owner) or made is None or made.co_filename != "<string>":
        return [], {}
    try:
        hints = typing.get_type_hints(owner)
    except Exception:  # annotations may name what only a type checker imports
        return [], {}
    parameters = inspect.signature(init).parameters.values()
    order = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return order, {f.name: (hints[f.name], f.default) for f in fields(owner) if f.init and is_known(hints[f.name])}


def same(a: Any, b: Any) -> bool:
    """Whether two values of options are equal. Tensors and arrays, whose `==` is of their elements, are where type, shape
    and content are. What holds some is where its parts are."""
    if a is b:
        return True
    if is_array(a) and type(a) is type(b):
        return bool((a.dtype, a.shape) == (b.dtype, b.shape) and a.tolist() == b.tolist())
    if not (holds_array(a) or holds_array(b)):
        return bool(a == b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    one, other = _parts(a), _parts(b)
    return type(a) is type(b) and len(one) == len(other) and all(map(same, one, other))


def is_array(value: Any) -> bool:
    """Whether it is a tensor of torch or an array of numpy, neither of which this module needs."""
    return hasattr(value, "tolist") and hasattr(value, "shape") and not isinstance(value, Number)


def holds_array(value: Any) -> bool:
    """Whether it is a tensor or an array, or has one among its parts."""
    return is_array(value) or any(map(holds_array, _parts(value)))


def _parts(value: Any) -> Sequence[Any]:
    """What a dataclass or a collection compares when it is compared."""
    if isinstance(value, dict):
        return [*value.items()]
    if isinstance(value, list | tuple):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in fields(value) if f.compare]
    return ()


def _mistyped(name: str, value: Any, kind: Any) -> ValueError:
    described = "float, and finite" if kind is float else kind.__name__ if isinstance(kind, type) else kind
    return ValueError(f"{name}={shown(value)} must be of type {described}")


def _items(value: Any) -> Iterable[Any]:
    """The members of a tuple, which may come as text: "1,2", "(1, 2)", "()"; a number by itself is the only one."""
    if isinstance(value, str):
        inner = value.strip()
        if inner[:1] + inner[-1:] in ("()", "[]"):
            inner = inner[1:-1].strip().removesuffix(",")
            return inner.split(",") if inner else ()
        return inner.split(",")
    if isinstance(value, Mapping):
        raise TypeError
    return value if isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0 else [value]


def is_integer(value: Any) -> bool:
    """Whether it is an integer of Python or numpy; true and false are none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _is_flag(value: Any) -> bool:
    """Whether it is true or false, of Python, numpy or torch: no number, though each converts it to one."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"


def _int(value: Any) -> int:
    if _is_flag(value):
        raise ValueError
    with suppress(TypeError):
        return operator.index(value)  # not through a float, which has 53 bits; numpy's and torch's integers too
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if float(value) != int(float(value)):
        raise ValueError
    return int(float(value))
