# SPDX-License-Identifier: Apache-2.0
"""Components by name: a file of decoders/, caches/ or runners/ is one, and `register` adds a class from anywhere else.

The file name is the name, so that adding a component is adding a file. A module that registers its own need only be imported
before the name is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdllm import fields
from fastdllm.fields import Option

if TYPE_CHECKING:
    from fastdllm.models.spec import ModelSpec


class Kind(str, Enum):
    """The kinds of components; the value names the folder."""

    DECODERS = "decoders"
    CACHES = "caches"
    RUNNERS = "runners"

    @classmethod
    def _missing_(cls, value: object) -> Kind:
        """The singular is understood too."""
        for kind in cls:
            if kind.option == value:
                return kind
        raise ValueError(f"kind={fields.shown(value)} is unknown; allowed are {', '.join(kind.value for kind in cls)}")

    @property
    def option(self) -> str:
        """The option of `DecodeConfig` that chooses one."""
        return {"decoders": "decoder", "caches": "cache", "runners": "runner"}[self.value]

    @property
    def class_name(self) -> str:
        """What the class is called in each file."""
        return self.option.capitalize()

    @property
    def base(self) -> type:
        """The class that all of them derive from."""
        base = {"decoders": "DecoderRule", "caches": "CachePlan"}.get(self.value)
        return getattr(import_module(f"fastdllm.{self.value}.base"), base) if base else object


_registered: dict[Kind, dict[str, type]] = {kind: {} for kind in Kind}


@cache
def shipped(kind: Kind) -> tuple[str, ...]:
    """The names that have a file, sorted."""
    folder = Path(__file__).parent / kind.value
    return tuple(sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base")))


def names(kind: Kind | str) -> tuple[str, ...]:
    """The names of one kind, sorted, registered ones included."""
    kind = Kind(kind)
    return tuple(sorted({*shipped(kind), *_registered[kind]}))


def register(kind: Kind | str, component: type, *, name: str | None = None) -> type:
    """Make a class selectable by name, wherever a name of the package is; returns the class.

    kind: "decoders" or "caches" (or "runners").
    component: a class, derived from `decoders.base.DecoderRule` or `caches.base.CachePlan`; as a dataclass, its fields with
        defaults are its options.
    name: default the class's own, in small letters with underscores (`MyRule` is "my_rule").

    Registering a name again replaces the class, so that a notebook's cell can be run twice. Raises ValueError for a class of
    another kind and for a name that ships with the package.
    """
    kind = Kind(kind)
    if not isinstance(component, type):
        raise ValueError(
            f"register takes a class, not the object {fields.shown(component)}; pass objects as {kind.option}=..."
        )
    if not issubclass(component, kind.base):
        raise ValueError(f"{component.__name__} must derive from fastdllm.{kind.value}.base.{kind.base.__name__}")
    name = snake_case(component.__name__) if name is None else name
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={fields.shown(name)} must be an identifier, such as my_rule")
    if name in shipped(kind):
        raise ValueError(f"name={name!r} is a {kind.option} that ships with fastdllm; give another name=")
    _registered[kind][name] = component
    return component


_imported: list[str] = []  # modules and absolute paths, in the order in which they were asked for


def imported() -> tuple[str, ...]:
    """What `import_modules` has imported in this process, for another one that needs the same components."""
    return tuple(_imported)


def import_modules(names: Sequence[str]) -> None:
    """Import modules for what they register: names, also of the current folder, or paths of Python files.

    ValueError names one that fails.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        path = Path(name).expanduser().resolve() if name.endswith(".py") else None
        try:
            if path is None:
                import_module(name)
            else:
                _import_file(path)
        except Exception as error:  # whatever a module does when it is imported
            raise ValueError(" ".join(f"--import {name}: {type(error).__name__}: {error}".split())) from error
        if (known := str(path or name)) not in _imported:
            _imported.append(known)


def _import_file(path: Path) -> None:
    """Import a file under its own name, so that what it defines can be pickled; modules of its folder may be imported."""
    if not path.is_file():
        raise ValueError("there is no such file")
    known = sys.modules.get(path.stem)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() != path:
            raise ValueError(f"a module {path.stem!r} is imported already; give the file another name")
        return
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError("it cannot be read as a module")
    sys.modules[path.stem] = module = module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def take_imports(arguments: Sequence[str]) -> list[str]:
    """A command line without its `--import MODULE`s, which are imported: what they register are options of its parser."""
    rest: list[str] = []
    modules: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument == "--import":
            modules.append(next(given, ""))
        elif argument.startswith("--import="):
            modules.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if "" in modules:
        raise ValueError("--import needs a module or a file, such as my_rules or folder/my_rules.py")
    import_modules(modules)
    return rest


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """--import, for its line in the help: `parse` has taken it out of the command line before."""
    parser.add_argument(
        "--import", metavar="MODULE", help="module or file that registers decoders and caches of your own; may be repeated"
    )


def parse(
    make: Callable[[], argparse.ArgumentParser], arguments: Sequence[str] | None = None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """A command's parser and what it reads, after `--import`: what the modules register are options of the parser.

    make: the parser, with what is registered by then.
    arguments: default those of this process.

    A module that cannot be imported ends the program with one line and exit code 2.
    """
    try:
        rest = take_imports(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        parser = make()
        parser.exit(2, f"{parser.prog}: {error}\n")
    parser = make()
    return parser, parser.parse_args(rest)


def unregister(kind: Kind | str, name: str) -> None:
    """Forget a registered name; one that is not registered is no error."""
    _registered[Kind(kind)].pop(name, None)


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def find(kind: Kind | str, name: str) -> type[Any]:
    """The class of that name; ValueError lists the known ones."""
    kind = Kind(kind)
    if name in _registered[kind]:
        return _registered[kind][name]
    if name not in shipped(kind):
        raise ValueError(f"{kind.option}={fields.shown(name)} is unknown; allowed are {', '.join(names(kind))}")
    return _shipped_class(kind, name)


@cache
def _shipped_class(kind: Kind, name: str) -> type[Any]:
    return getattr(import_module(f"fastdllm.{kind.value}.{name}"), kind.class_name)


def class_of(kind: Kind | str, chosen: Any) -> type:
    """The class of what an option chose: a name, a class, or an object. ValueError where it is none of this kind."""
    kind = Kind(kind)
    if isinstance(chosen, str):
        return find(kind, chosen)
    component = chosen if isinstance(chosen, type) else type(chosen)
    if not issubclass(component, kind.base):
        raise ValueError(
            f"{kind.option}={fields.shown(chosen)} must be a name ({', '.join(names(kind))}), or an object or class derived "
            f"from fastdllm.{kind.value}.base.{kind.base.__name__}"
        )
    return component


def name_of(chosen: Any) -> str:
    """How a message calls what an option chose: its name, else the name of its class."""
    return chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)


def settable(kind: Kind | str, chosen: Any) -> dict[str, Option]:
    """The options of what was chosen by name or as a class; an object has its values already, and so has none."""
    if chosen is None or not isinstance(chosen, str | type):
        return {}
    return declared(class_of(kind, chosen))


@cache
def declared(component: type) -> dict[str, Option]:
    """The options of a decoder's or cache's class: its fields that have a default."""
    return fields.read(component) if dataclasses.is_dataclass(component) else {}


def field_names(component: type) -> set[str]:
    """The names of a dataclass's fields, those without a default included."""
    return {f.name for f in dataclasses.fields(component)} if dataclasses.is_dataclass(component) else set()


def options(kind: Kind | str, name: str) -> dict[str, Any]:
    """Option -> declared type: the dataclass fields that have a default (the others are filled in by `build.py`)."""
    return {option.name: option.kind for option in settable(kind, name).values()}


def fits(cache: Any, spec: ModelSpec) -> bool:
    """Whether a cache, as an option chose it, is one for the model's family: one whose finished blocks never change, one
    that reads its context causally, or one that reads both ways."""
    return class_of(Kind.CACHES, cache).fits(bool(spec.block_causal), spec.causal_context)


def caches_for(spec: ModelSpec) -> tuple[str, ...]:
    """The names of the caches that fit the model's family."""
    return tuple(name for name in names(Kind.CACHES) if fits(name, spec))
