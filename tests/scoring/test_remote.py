# SPDX-License-Identifier: Apache-2.0
"""Values and objects between a program and its tests: nothing is lost that tests need, and nothing is believed."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdllm.scoring import checks, values
from fastdllm.scoring.remote import Channel, ChecksSide, Gone, Handle, ProgramSide

ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**5000, max_value=10**5001),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters()),
    st.binary(),
    st.fractions(),
    st.decimals(allow_nan=False),
    st.dates(),
    st.datetimes(),
    st.times(),
    st.timedeltas(),
    st.sampled_from([int, str, dict, ValueError, range(3), range(9, 1, -2), "\ud800", "a\nb", -0.0]),
)
HASHED = st.recursive(
    ATOMS, lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)), max_leaves=4
)
VALUES = st.recursive(
    HASHED,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.sets(HASHED, max_size=3),
        st.dictionaries(HASHED, inner, max_size=3),
        st.dictionaries(HASHED, inner, max_size=3).map(collections.OrderedDict),
        st.lists(inner, max_size=3).map(lambda items: collections.deque(items, maxlen=5)),
        st.lists(HASHED, max_size=3).map(collections.Counter),
        st.binary().map(bytearray),
    ),
    max_leaves=8,
)


def no_reference(value: Any) -> dict[str, Any]:
    raise TypeError(type(value).__name__)


def over(value: Any) -> Any:
    return values.decode(json.loads(json.dumps(values.encode(value, no_reference))), no_reference)


def types_in(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), [(types_in(key), types_in(item)) for key, item in value.items()]
    return (type(value), [types_in(item) for item in value]) if isinstance(value, (list, tuple)) else type(value)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_values_arrive_as_they_were(value: Any) -> None:
    assert over(value) == value
    assert types_in(over(value)) == types_in(value)


def test_values_that_equal_nothing_or_their_base() -> None:
    class Name(str):
        pass

    Point = collections.namedtuple("Point", "x y")
    assert math.isnan(over(float("nan")))
    assert over({1: 2}.keys()) == {1} and over({1: 2}.items()) == {(1, 2)}
    assert over(collections.defaultdict(list, {1: [2]})) == {1: [2]}
    for value, base in ((Name("a"), "a"), (Point(1, 2), (1, 2)), (np.float64(0.1), 0.1), (np.int64(3), 3), (np.True_, True)):
        assert over(value) == base and type(over(value)) is type(base)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text("ab<", max_size=9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["kind", "parts", "type", "handle", "callback", "iterator", "x"]), inner, max_size=3
        ),
        st.fixed_dictionaries({"kind": st.sampled_from([*values._FORMS]), "parts": inner}),
        st.fixed_dictionaries({"type": st.sampled_from(["int", "eval", "open", "x"])}),
        st.fixed_dictionaries({"raised": inner}),
        st.fixed_dictionaries({"value": inner, "args": inner}),
    ),
    max_leaves=6,
)


class Scripted:
    """A channel that says what it was given, then ends."""

    broken = ""

    def __init__(self, *messages: Any) -> None:
        self.messages = list(messages)

    def send(self, message: Any) -> None:
        json.dumps(message)

    def receive(self) -> Any:
        if not self.messages:
            raise Gone
        return self.messages.pop(0)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["value", "raised", "args", "ask", "kwargs", "module", "missing"]), JSON))
def test_whatever_a_program_answers_is_a_plain_value_or_an_exception(reply: dict[str, Any]) -> None:
    for act in (lambda tester: tester.perform("call", 1, [2]), lambda tester: tester.name("math"), ChecksSide.run):
        tester = ChecksSide(Scripted(reply))  # type: ignore[arg-type]
        try:
            value = act(tester)
        except Exception:  # what a test may meet, and fails by
            continue
        except Gone:
            continue
        except BaseException as error:
            assert type(error).__name__ == "ProgramExit"
            continue
        assert not callable(value) or type(value) is Handle or isinstance(value, type)


@contextmanager
def running(program: str) -> Iterator[ChecksSide]:
    """A program's side in a thread."""
    asked, answered = os.pipe(), os.pipe()
    tested = ProgramSide(Channel(asked[0], answered[1]), program)
    thread = threading.Thread(target=tested.serve)
    thread.start()
    try:
        yield ChecksSide(Channel(answered[0], asked[1]))
    finally:
        os.close(asked[1])
        thread.join()
        for fd in (asked[0], *answered):
            os.close(fd)


def outcome(program: str, source: str, setup: str = "", names: tuple[str, ...] = ("f",)) -> dict[str, str]:
    with running(program) as tester:
        return checks.run(tester, program, source, setup, names)


CLASS = """
class Node:
    def __init__(self, value, left=None): self.value, self.left = value, left
    def __eq__(self, other): return isinstance(other, Node) and self.value == other.value
    def __lt__(self, other): return self.value < other.value
    def __add__(self, other): return Node(self.value + other.value)
    def __hash__(self): return hash(self.value)
    def __len__(self): return 3
    def __getitem__(self, at): return [7, 8, 9][at]
    def __bool__(self): return self.value > 0
    def __str__(self): return f"<{self.value}>"
    def depth(self, *more, **named): return 1 + (self.left.depth() if self.left else 0) + len(more) + len(named)
"""
# program, tests
PASSING = {
    "mutable arguments": (
        "def f(a, d, s):\n    a.append(1); a[0].append(2); d['x'] = [3]; s.add(4)",
        "a, d, s = [[]], {'y': 0}, set()\ninner = a[0]\nf(a, d, s)\n"
        "assert (a, d, s) == ([[2], 1], {'y': 0, 'x': [3]}, {4})\nassert inner is not None",
    ),
    "inner containers stay themselves": ("def f(a): a[0].append(2)", "i = []\nf([i])\nassert i == [2]"),
    "keywords": ("def f(*a, **k): return a, k", "assert f(1, *[2], x=(3,)) == ((1, 2), {'x': (3,)})"),
    "functions as arguments": (
        "def f(g, x): return [g(i) for i in x]",
        "n = 3\nassert f(lambda i: i + n, (1, 2)) == [4, 5]\nassert f(str, [1]) == ['1']",
    ),
    "functions that fail": (
        "def f(g):\n    try: g()\n    except KeyError as e: return e.args",
        "def g(): raise KeyError('k')\nassert len(f(g)) == 1",
    ),
    "functions in between": (
        "def f(g, n): return n if n == 0 else g(n - 1)",
        "assert f(lambda n: f(lambda m: m, n), 5) == 3",
    ),
    "iterators as arguments": ("def f(x): return [*x]", "assert f(iter([1, 2])) == [1, 2] == f(i for i in (1, 2))"),
    "generators": (
        "def f():\n    yield 1\n    yield 2",
        "assert [*f()] == [1, 2]\ng = f()\nassert next(g) == 1 and [*g] == [2]",
    ),
    "maps": ("def f(): return map(str, [1])", "assert list(f()) == ['1'] and sorted(f()) == ['1']"),
    "matches": (
        "import re\ndef f(): return re.match('a(b)', 'ab')",
        "assert f() and f().group(1) == 'b' and not f().group(0) == 'a'",
    ),
    "closures": ("def f(n): return lambda x: x + n", "assert f(1)(2) == 3 and callable(f(1))"),
    "partial results": ("def f(): return {'a': [(1, lambda: 2)]}", "assert f()['a'][0][1]() == 2"),
    "modules of the program": ("import math\ndef f(): return 0.3", "assert math.isclose(f(), 0.1 + 0.2)"),
    "exceptions": (
        "class E(ValueError): pass\ndef f(n):\n    if n: raise E('no')\n    raise KeyError(3)",
        "try: f(1)\nexcept ValueError as e: assert 'no' in str(e)\nelse: assert False\n"
        "try: f(0)\nexcept LookupError: pass\nelse: assert False",
    ),
    "attributes": ("def f(): pass\nf.calls = 3", "assert f.calls == 3 and f.__name__ == 'f' and hasattr(f, 'calls')"),
    "no attributes": (
        "def f(): pass",
        "assert not hasattr(f, 'nothing')\ntry: f.x\nexcept AttributeError: pass\nelse: assert 0",
    ),
    "changed, given by name": (
        "def f(data, k): data[k].sort()",
        "d = {'k': [2, 1]}\nf(data=d, k='k')\nassert d == {'k': [1, 2]}",
    ),
    "changed, given twice": ("def f(a, b): a.append(1)", "d = []\nf(d, d)\nf(d, b=d)\nassert d == [1, 1]"),
    "changed deques": (
        "def f(d): d.append(1)",
        "from collections import deque\nd, e = deque(), [deque()]\nf(d)\nf(e)\nassert [*d] == [1] and e[1] == 1",
    ),
    "default values": (
        "from collections import defaultdict\ndef f(d):\n    d['a'].append(1)\n    return defaultdict(int, d)",
        "from collections import defaultdict\nd = defaultdict(list)\nassert f(d)['b'] == 0 and d == {'a': [1]}",
    ),
    "set before": ("def f(): return K\nK = 2", "assert f() == K"),
    "the same object": ("x = object()\ndef f(): return x", "assert f() is f() and f() == f() and f() in [f()]"),
}
NODES = {
    "built by the tests": "root = f(1)\nroot.left = f(2)\nroot.left.left = f(3, None)\nassert root.depth() == 3",
    "operators among them": "assert f(1) == f(1) != f(2) and f(1) < f(2) and (f(1) + f(2)).value == 3 and f(5) in {f(5)}",
    "protocols": "assert len(f(1)) == 3 and [*f(1)] == [7, 8, 9] and f(1)[0] == 7 and not f(0) and str(f(4)) == '<4>'",
    "kinds": "assert isinstance(f(1), f) and not isinstance(3, f) and not isinstance(f(1), (int, str))",
    "bound methods": "m = f(1).depth\nassert m(1, a=2) == 3",
}


@pytest.mark.parametrize("name", [*PASSING, *NODES])
def test_tests_can_do_what_they_do_in_one_process(name: str) -> None:
    program, source = PASSING[name] if name in PASSING else (f"{CLASS}\nf = Node", NODES[name])
    names = ("f", "math", "K") if name in ("modules of the program", "set before") else ("f",)
    in_one: dict[str, Any] = {"__name__": "tests"}
    exec(program, in_one)
    exec(source, in_one)  # or the case itself is wrong
    assert outcome(program, source, names=names) == {"status": "passed", "message": ""}


# What must not pass: the tests would ask the program whether it is right.
REFUSED = {
    "equal": "assert f() == 4",
    "different": "assert not f() != 4",
    "less": "assert f() < 4",
    "difference": "assert abs(f() - 4) < 1",
    "reversed": "assert abs(4 - f()) < 1",
    "contains": "assert 4 in f()",
    "close": "import math\nassert math.isclose(f(), 4)",
    "arrays": "import numpy\nassert numpy.asarray(f()).sum() == 4",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_object_of_the_program_is_not_told_what_is_expected(name: str) -> None:
    program = """
told = []
class Spy:
    __array_interface__ = {"data": (1, True), "shape": (1,), "typestr": "<i8", "version": 3}
    def __getattr__(self, name): return self
    def note(self, *other): told.extend(other); return True
    __eq__ = __ne__ = __lt__ = __gt__ = __contains__ = note
    def __sub__(self, other): told.append(other); return 0
    __rsub__ = __sub__
    def __hash__(self): return 0
    def __iter__(self): return iter([Spy()])
    def __float__(self): return 1.0
    def __len__(self): return 1
    def __getitem__(self, at): raise IndexError
def f(): return Spy()
"""
    with running(program) as tester:
        assert checks.run(tester, program, REFUSED[name], "", ("f",))["status"] == "failed"
        assert tester.name("told") == []


# Each goes through cases, and takes StopIteration for their end.
ENDED_EARLY = {
    "map": "assert all(map(lambda n: f(n) == n + 1, [1, 2]))",
    "zip": "assert all(a == b for a, b in zip(map(f, [1, 2]), [2, 3]))",
    "filter": "assert not [*filter(lambda n: f(n) != n + 1, [1, 2])]",
    "starmap": "import itertools\nassert all(itertools.starmap(lambda n, m: f(n) == m, [(1, 2)]))",
    "iter": "assert [*iter(lambda: f(1), 2)] == []",
    "conversion": "assert all(map(lambda n: bool(g(n)), [1, 2]))",
    "attribute": "assert all(map(lambda n: g(n).x == n, [1, 2]))",
}


@pytest.mark.parametrize("name", ENDED_EARLY)
def test_a_program_cannot_end_its_tests_by_an_exception_that_iteration_swallows(name: str) -> None:
    program = """
class End(StopIteration): pass
class G:
    def __bool__(self): raise End
    __getattr__ = __len__ = lambda self, *name: bool(self)
def f(n): raise End
def g(n): return G()
"""
    assert outcome(program, ENDED_EARLY[name], names=("f", "g"))["status"] == "failed"


def test_the_problem_s_own_definitions_go_before_the_program_s() -> None:
    program = "def helper(x): return True\ndef f(): return 3"
    assert outcome(program, "assert helper(f())", "def helper(x): return x == 4", ("f",))["status"] == "failed"


@pytest.mark.parametrize("source", ["try: f()\nexcept: pass", "try: f()\nexcept BaseException: pass\nassert True"])
def test_a_program_that_ends_does_not_pass_by_a_test_that_catches_everything(source: str) -> None:
    tester = ChecksSide(Scripted({"value": None}, {"value": {"handle": 0}}))  # type: ignore[arg-type]
    tester.channel.broken = "ended"
    assert checks.run(tester, "", source, "", ("f",))["status"] == checks.ENDED


def test_messages_name_the_line_that_failed() -> None:
    assert (
        outcome("def f():\n    return 1 / 0", "assert f()")["message"]
        == "ZeroDivisionError: division by zero at: return 1 / 0"
    )
    assert (
        outcome("def f(): return 2", "x = 1\nassert f() == x, 'two'")["message"]
        == "AssertionError: two at: assert f() == x, 'two'"
    )
    assert outcome("def g(): pass", "assert f() == 1")["message"].startswith("NameError: name 'f' is not defined")
    assert len(outcome("def f(): raise ValueError('x' * 10**6)", "f()")["message"]) <= 1000


def test_known_types_need_no_more_than_their_data() -> None:
    """Reading back imports nothing but the standard library's own types."""
    expected = [fractions.Fraction(1, 3), decimal.Decimal("0.1"), datetime.date(2024, 2, 29), datetime.timedelta(1, 2, 3)]
    assert over(expected) == expected
    for bad in ({"kind": "os.system", "parts": "x"}, {"kind": "builtins.eval", "parts": "1"}, {"type": "open"}):
        with pytest.raises(ValueError, match="unknown"):
            values.decode(bad, no_reference)
