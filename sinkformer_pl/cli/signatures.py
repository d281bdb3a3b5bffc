"""Signatures of classes: the arguments that settings can give them, and the values that an argument takes."""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from sinkformer_pl.factories import parameters_of

# What runs commands or code isn't imported for the sake of a value that names it.
set_parsing_settings(import_path_denylist=[])

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}

PLAIN_MODULES = ("builtins", "torch", "datetime", "typing", "collections.abc")
"""Modules whose classes are values, such as a number, a device or a time."""

UNIONS = (Union, types.UnionType)


FIXED = "fixed"
"""Annotated[Class, FIXED] is the annotation of settings for this class alone, no subclass of it."""


@dataclass(frozen=True)
class Place:
    """A class, or a factory of one, that an argument takes.

    Attributes:
        base: the class; others are subclasses of it.
        supplied: how many of its first arguments come from whoever calls the factory; None where the argument takes an
            instance, not a factory.
        fixed: no other class can stand here.
    """

    base: type
    supplied: int | None = None
    fixed: bool = False

    def arguments_of(self, cls: type) -> dict[str, inspect.Parameter]:
        """Return the arguments of a class here that settings can give: not the first ones, if a caller has them."""
        return dict(list(parameters_of(cls).items())[self.supplied or 0 :])


@functools.lru_cache(maxsize=1000)
def places_of(hint: Any) -> tuple[Place, ...]:
    """Return the classes that an annotation names, in lists too; none for plain values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Callable or (inspect.isclass(origin) and issubclass(origin, Callable)):  # type: ignore[arg-type]
        made, given = (arguments[-1], arguments[0]) if arguments else (None, [])
        supplied = len(given) if isinstance(given, list) else 0
        return (Place(made, supplied),) if inspect.isclass(made) and made is not type(None) else ()
    if origin is Annotated and FIXED in arguments:
        return (Place(arguments[0], fixed=True),)
    if origin in UNIONS or (inspect.isclass(origin) and origin not in (tuple, dict, type)) or origin is Annotated:
        return tuple(place for argument in arguments for place in places_of(argument))
    plain = not inspect.isclass(hint) or hint.__module__ in PLAIN_MODULES
    return () if plain or issubclass(hint, Enum | PurePath) else (Place(hint, fixed=is_dataclass(hint)),)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    return get_args(hint) if get_origin(hint) in UNIONS else (hint,)


def takes_text(hint: Any) -> bool:
    """Tell whether any text can stand here that names no class: a path, a number."""
    return any(kind in (str, int, float, Any, inspect.Parameter.empty) for kind in alternatives(hint))


def words_of(hint: Any) -> tuple[str, ...]:
    """Return the words that can stand here."""
    literals = (get_args(kind) for kind in alternatives(hint) if get_origin(kind) is Literal)
    return tuple(word for words in literals for word in words if isinstance(word, str))


def takes_list(hint: Any) -> bool:
    """Tell whether a list can stand here."""
    origins = [get_origin(kind) for kind in alternatives(hint)]
    return any(inspect.isclass(origin) and origin is not tuple and issubclass(list, origin) for origin in origins)


def takes_null(parameter: inspect.Parameter) -> bool:
    """Tell whether null can stand here: by the default, or by an annotation, which may leave it open."""
    unsaid = (type(None), Any, inspect.Parameter.empty)
    return parameter.default is None or any(kind in unsaid for kind in alternatives(parameter.annotation))


def convert(value: Any, hint: Any) -> Any:
    """Convert a value, as it was written, to what an annotation asks for.

    Raises:
        ValueError: it is none of these.
    """
    parser = _parser(hint)
    try:
        return parser.parse_object({"value": value}).value
    except (ArgumentError, TypeError, AttributeError) as error:
        raise ValueError(words(hint)) from error


def words(hint: Any) -> str:
    """Say what an annotation asks for, such as "a whole number or null"."""
    found = dict.fromkeys(filter(None, map(_word, alternatives(hint))))
    return " or ".join(found) or "another value"


def _word(kind: Any) -> str | None:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is Annotated:
        return words(get_args(kind)[0])
    origin = get_origin(kind) or kind
    if origin in (tuple, list) or (inspect.isclass(origin) and issubclass(list, origin)):
        return "a list, such as [1, 2]"
    return WORDS.get(kind) or ("settings, such as {name: value}" if origin is dict else None)


@functools.lru_cache(maxsize=1000)
def _parser(hint: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=Any if hint is inspect.Parameter.empty else hint)
    return parser


def read_text(text: Any) -> Any:
    """Read a text as YAML does: "3" is a number, "null" is None; what isn't YAML stays a text."""
    if not isinstance(text, str):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text
