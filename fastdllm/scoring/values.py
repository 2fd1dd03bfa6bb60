# SPDX-License-Identifier: Apache-2.0
"""Python values <-> JSON, for values that come from a program nobody has read.

Reading builds plain values of the types listed here and runs nothing of the program; subclasses arrive as their base.
What is none of them is for the caller to name, by a reference that means nothing elsewhere. Standard library only.
"""

from __future__ import annotations

import builtins
import importlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

Refer = Callable[[Any], dict[str, Any]]
Resolve = Callable[[dict[str, Any]], Any]
_SHORT = 1 << 63
_MOST_ITEMS = 100_000  # of an iterator that is handed over as what it yields


def _library(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# type: (what a value of it consists of, the value made of that); the parts are encoded in turn.
_FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "builtins.int": (lambda value: hex(int.__int__(value)), lambda text: int(text, 16)),
    "builtins.complex": (lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "builtins.bytes": (bytes.hex, bytes.fromhex),
    "builtins.bytearray": (bytearray.hex, bytearray.fromhex),
    "builtins.tuple": (lambda value: [*tuple.__iter__(value)], tuple),
    "builtins.set": (lambda value: [*set.__iter__(value)], set),
    "builtins.frozenset": (lambda value: [*frozenset.__iter__(value)], frozenset),
    "builtins.dict": (lambda value: [[*pair] for pair in dict.items(value)], dict),
    "builtins.dict_keys": (list, lambda keys: dict.fromkeys(keys).keys()),
    "builtins.dict_items": (lambda items: [[*pair] for pair in items], lambda pairs: dict(pairs).items()),
    "builtins.range": (lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    "collections.OrderedDict": (
        lambda value: [[*pair] for pair in value.items()],
        lambda pairs: _library("collections", "OrderedDict")(pairs),
    ),
    "collections.Counter": (
        lambda value: [[*pair] for pair in dict.items(value)],
        lambda pairs: _library("collections", "Counter")(dict(pairs)),
    ),
    "collections.defaultdict": (
        lambda value: [_builtin(value.default_factory), [[*pair] for pair in dict.items(value)]],
        lambda parts: _library("collections", "defaultdict")(*parts),
    ),
    "collections.deque": (
        lambda value: [[*value], value.maxlen],
        lambda parts: _library("collections", "deque")(*parts),
    ),
    "fractions.Fraction": (
        lambda value: [value.numerator, value.denominator],
        lambda parts: _library("fractions", "Fraction")(*parts),
    ),
    "decimal.Decimal": (str, lambda text: _library("decimal", "Decimal")(text)),
    "datetime.datetime": (
        lambda value: value.isoformat(),
        lambda text: _library("datetime", "datetime").fromisoformat(text),
    ),
    "datetime.date": (lambda value: value.isoformat(), lambda text: _library("datetime", "date").fromisoformat(text)),
    "datetime.time": (lambda value: value.isoformat(), lambda text: _library("datetime", "time").fromisoformat(text)),
    "datetime.timedelta": (
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: _library("datetime", "timedelta")(*parts),
    ),
}


def _builtin(factory: Any) -> type[Any] | None:
    return factory if isinstance(factory, type) and vars(builtins).get(factory.__name__) is factory else None


def encode(value: Any, refer: Refer) -> Any:
    """`value` as JSON can carry it; `refer` gives the reference of a part that is none of the known types."""
    if value is None or type(value) in (bool, str, float):
        return value
    if type(value) is int and -_SHORT <= value < _SHORT:
        return value
    if isinstance(value, type):
        return _encode_type(value, refer)
    for kind in type(value).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _FORMS:
            return {"kind": name, "parts": encode(_FORMS[name][0](value), refer)}
        if kind is list:
            return [encode(item, refer) for item in list.__iter__(value)]
        if kind is str:
            return str.__str__(value)
        if kind is float:
            return float.__float__(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return encode(value.item(), refer)
    return refer(value)


def _encode_type(kind: type[Any], refer: Refer) -> dict[str, Any]:
    return {"type": kind.__name__} if vars(builtins).get(kind.__name__) is kind else refer(kind)


def decode(data: Any, resolve: Resolve) -> Any:
    """The value of `encode`'s result; `resolve` knows references. ValueError for what is neither."""
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    if data.keys() == {"kind", "parts"}:
        if data["kind"] not in _FORMS:
            raise ValueError(f"unknown kind of value {data['kind']!r}")
        return _FORMS[data["kind"]][1](decode(data["parts"], resolve))
    if data.keys() == {"type"}:
        found = vars(builtins).get(str(data["type"]))
        if not isinstance(found, type):
            raise ValueError(f"unknown type {data['type']!r}")
        return found
    if data.keys() == {"iterator"}:
        return iter(decode(data["iterator"], resolve))
    return resolve(data)


def encode_iterator(value: Iterator[Any], refer: Refer) -> dict[str, Any]:
    """An iterator as what it yields, which uses it up."""
    items = [*islice(value, _MOST_ITEMS + 1)]
    if len(items) > _MOST_ITEMS:
        raise ValueError(f"an iterator of more than {_MOST_ITEMS} items cannot be handed to a program")
    return {"iterator": encode(items, refer)}


def restore(old: Any, new: Any) -> None:
    """Give the containers inside `old` the contents that a call has left in `new`, its copy."""
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        merged = [_merged(*pair) for pair in zip(old, new, strict=True)]
        if isinstance(old, list):
            old[:] = merged
    elif isinstance(old, (list, bytearray)) and type(new) is type(old):
        old[:] = new
    elif isinstance(old, dict) and isinstance(new, dict):
        merged_items = {key: _merged(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(merged_items)
    elif isinstance(old, (set, deque)) and type(new) is type(old):
        items = [*new]
        old.clear()
        (old.update if isinstance(old, set) else old.extend)(items)


def _merged(old: Any, new: Any) -> Any:
    """`old` with the contents of `new` if both are containers of one type, else `new`."""
    if type(old) is not type(new) or not isinstance(old, (list, tuple, dict, set, bytearray, deque)):
        return new
    if isinstance(old, tuple) and len(old) != len(new):
        return new
    restore(old, new)
    return old
