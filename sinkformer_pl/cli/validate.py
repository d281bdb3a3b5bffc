"""Check settings against the signatures of the classes that they name, before anything is made of them.

A wrong key is looked for among all keys of the command; a wrong name of a class among those that its place takes.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from sinkformer_pl.cli.layers import SPEC_KEYS, Layers, as_spec, lookup
from sinkformer_pl.cli.signatures import (
    Place,
    convert,
    places_of,
    read_text,
    takes_list,
    takes_null,
    takes_text,
    words_of,
)
from sinkformer_pl.errors import UserError, closest, did_you_mean
from sinkformer_pl.factories import abstract, describe, import_class, public_path
from sinkformer_pl.normalizations import AttentionNormalization, registered
from sinkformer_pl.tasks.rate_plan import length_argument
from sinkformer_pl.tasks.schedules import torch_schedulers

SURE = 0.7
"""Least likeness, up to 1, of a key that may have been meant; a worse guess misleads."""


@dataclass(frozen=True)
class Spec:
    """A class and the arguments given to it, checked and converted.

    Attributes:
        cls: the class.
        place: what its place takes.
        arguments: by name; others have their defaults.
    """

    cls: type
    place: Place
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return an argument, or its default."""
        if name in self.arguments:
            return self.arguments[name]
        return self.place.arguments_of(self.cls)[name].default

    def with_argument(self, name: str, value: Any) -> "Spec":
        """Return the same with another value of an argument."""
        return replace(self, arguments={**self.arguments, name: value})

    def build(self) -> Any:
        """Make an instance, or a factory where the place takes one."""
        arguments = {name: built(value) for name, value in self.arguments.items()}
        return self.cls(**arguments) if self.place.supplied is None else functools.partial(self.cls, **arguments)

    def plain(self) -> dict[str, Any]:
        """Return class and arguments as plain data, defaults filled in; the arguments alone if the place is fixed."""
        parameters = self.place.arguments_of(self.cls)
        # What follows from the data can't be given.
        linked: Mapping[str, str] = getattr(self.cls, "from_data", {})
        names = [name for name, p in parameters.items() if name in self.arguments or p.default is not p.empty]
        names = [name for name in names if name not in linked]
        arguments = {name: as_plain(self[name]) for name in names}
        if self.place.fixed:
            return arguments
        beyond = {name: as_plain(value) for name, value in self.arguments.items() if name not in parameters}
        parts = {"init_args": arguments, "dict_kwargs": beyond}
        return {"class_path": public_path(self.cls), **{part: values for part, values in parts.items() if values}}


def as_plain(value: Any) -> Any:
    """Return a value as a YAML file can hold it; what it can't hold as text."""
    if isinstance(value, Spec):
        return value.plain()
    if isinstance(value, Mapping):
        return {str(name): as_plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(inner) for inner in value]
    if inspect.isclass(value) or isinstance(value, functools.partial):
        spec = describe(value)
        return spec if spec["init_args"] else {"class_path": spec["class_path"]}
    if inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def validate(layers: Layers, root: type) -> Spec:
    """Check all settings of a command.

    Args:
        layers: the settings, merged.
        root: class whose arguments are the settings; its groups are arguments that take classes.

    Raises:
        UserError: names the key, the value, what would be right, and the file if it is from one.
    """
    try:
        return _Check(layers).spec(layers.values, Place(root, fixed=True), "")
    except _UnknownKeyError as error:
        raise UserError(_describe_unknown(error, layers, root)) from None


def classes_of(base: type) -> dict[str, type]:
    """Return the classes that can stand where one of a kind is asked for, by short name: those that were imported."""
    if base is AttentionNormalization:
        return dict(registered())
    if base is LRScheduler:
        return dict(torch_schedulers())
    found: dict[str, type] = {}
    for cls in _subclasses(base):
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, cls)
    return dict(sorted(found.items()))


def find_class(name: str, base: type, key: str) -> type:
    """Return the class of a short name or a dotted path.

    Raises:
        UserError: there is none, it isn't of the kind asked for, or abstract; lists the valid ones.
    """
    return _Check(Layers()).find(name, key, base)


class _UnknownKeyError(Exception):
    def __init__(self, key: str, owner: type, place: Place) -> None:
        self.key, self.owner, self.place = key, owner, place


class _Check:
    def __init__(self, layers: Layers) -> None:
        self.layers = layers

    def error(self, key: str, text: str) -> UserError:
        """Make an error of a key, with the file that it is from."""
        return UserError(f"{self.layers.source(key)}{text}")

    def spec(self, value: Any, place: Place, key: str, default: type | None = None) -> Spec:
        """Check a class with its arguments; `default` is the class if none is named."""
        parts = self.settings(value, place, key) if place.fixed else self.parts(value, place, key, default)
        name, given, replaced = parts.get("class_path"), parts.get("init_args") or {}, parts.get("replaced") or {}
        extra = parts.get("dict_kwargs") or {}
        cls = place.base if place.fixed else self.find(str(name), key, place.base) if name else default
        assert cls is not None
        if not all(isinstance(part, Mapping) for part in (given, replaced, extra)):
            raise self.error(key, f"{key}.init_args: expected lines 'name: value'")
        parameters = place.arguments_of(cls)
        linked: Mapping[str, str] = getattr(cls, "from_data", {})
        for name in given:
            if name in linked:
                raise self.error(
                    f"{key}.{name}", f"{key}.{name} can't be set: it follows from data.{linked[name]}; leave it out"
                )
            if name not in parameters:
                raise _UnknownKeyError(_join(key, name), cls, place)
        arguments = {name: self.value(inner, parameters[name], _join(key, name)) for name, inner in given.items()}
        for name in replaced.keys() & parameters.keys() - given.keys() - linked.keys():
            # What can't be taken over was meant for another class.
            with contextlib.suppress(UserError, _UnknownKeyError):
                arguments[name] = self.value(replaced[name], parameters[name], _join(key, name))
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        supplied = {*linked, length_argument(cls)}
        if missing := [name for name in required if name not in arguments and name not in supplied]:
            needs = "" if place.fixed else f"{cls.__name__} needs {', '.join(missing)}; "
            keys = ", ".join(_join(key, name) for name in missing)
            raise self.error(key, f"{keys} missing: {needs}give it as a flag, or a --config that has it")
        # In the order of the signature, in which they are written.
        return Spec(cls, place, {n: arguments[n] for n in parameters if n in arguments} | dict(extra))

    def settings(self, value: Any, place: Place, key: str) -> Mapping[str, Any]:
        """Return the settings of a class that is fixed as its arguments."""
        if not isinstance(value, Mapping):
            example = next(iter(place.arguments_of(place.base)))
            raise self.error(key, f"{key} {value}: expected settings, such as {key}.{example}")
        return value if value.keys() & {"class_path", "init_args"} else {"init_args": value}

    def parts(self, value: Any, place: Place, key: str, default: type | None) -> Mapping[str, Any]:
        """Return the parts in which a class is written, such as "class_path"."""
        spec = as_spec(value)
        if unknown := [str(name) for name in spec if name not in SPEC_KEYS]:
            raise self.error(
                key,
                f"{key} {spec.get('class_path')}: its arguments stand beside class_path; put them under init_args: "
                f"{', '.join(unknown)}",
            )
        if not spec.get("class_path") and default is None:
            raise self.error(
                key,
                f"{key}: no class is named; write class_path: NAME and init_args: below it, or give --{key} NAME"
                f"\n{_listed(place.base)}",
            )
        return spec

    def find(self, name: str, key: str, *bases: type) -> type:
        """Find a class of one of some kinds by its short name or its dotted path."""
        valid = {name: cls for one in bases for name, cls in classes_of(one).items()}
        known = {cls.__name__: cls for one in bases for cls in (one, *_subclasses(one))} | valid
        problem = ""
        try:
            cls = import_class(name) if "." in name else known[name]
        except KeyError:
            problem = f"no class of this name{did_you_mean(name, valid)}"
        except UserError as error:
            missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
            problem = "this is no class" if "is no class" in str(error) else "no class of this name"
            problem += (
                f": Python finds no module {missing}; run from the folder that has it, or install it"
                if missing
                else did_you_mean(name.rpartition(".")[2], valid)
            )
        else:
            if inspect.isabstract(cls) and issubclass(cls, bases):
                raise self.error(key, f"{key} {abstract(cls)}")
            if not issubclass(cls, bases):
                problem = f"this class is no {' or '.join(one.__name__ for one in bases)}; give one that is"
            elif cls in bases and valid.keys() - {cls.__name__}:
                problem = "this is what all of them are; give one"
        if problem:
            raise self.error(key, f"{key} {name}: {problem}\n{_listed(*bases)}") from None
        return cls

    def value(self, value: Any, parameter: inspect.Parameter, key: str) -> Any:
        """Check and convert the value of an argument."""
        hint, places = parameter.annotation, places_of(parameter.annotation)
        if places:
            value = read_text(value)
        if value in (None, "null", "~"):
            if not takes_null(parameter):
                default = "" if parameter.default is parameter.empty else f"; its default is {parameter.default}"
                raise self.error(key, f"{key} null: give a value, or leave it out{default}")
            return None
        if places and isinstance(value, list) and takes_list(hint):
            return [self.value(inner, parameter, key) for inner in value]
        words = words_of(hint)
        named = isinstance(value, Mapping) or (isinstance(value, str) and value not in words and not takes_text(hint))
        if places and (named or places[0].fixed):
            try:
                return self.class_of(value, places, parameter, key)
            except UserError as error:
                if words and isinstance(value, str):
                    raise UserError(f"{error}, or a word: {', '.join(words)}") from None
                raise
        if isinstance(value, Mapping) and "class_path" in value:
            raise self.error(key, f"{key} {value['class_path']}: no class can stand here; leave it out")
        try:
            return convert(value, hint)
        except ValueError as error:
            raise self.error(key, f"{key} {value}: expected {error}") from None

    def class_of(self, value: Any, places: Sequence[Place], parameter: inspect.Parameter, key: str) -> Spec:
        """Check a class against each place that an argument has for one."""
        default = _default_class(parameter)
        bases = list(dict.fromkeys(place.base for place in places))
        name = (
            as_spec(value).get("class_path") if len(bases) > 1 and all(p.supplied is not None for p in places) else None
        )
        if isinstance(name, str):
            chosen = self.find(name, key, *bases)
            places = [place for place in places if issubclass(chosen, place.base)]
        errors: list[Exception] = []
        for place in places:
            try:
                return self.spec(value, place, key, default)
            except UserError as error:
                errors.append(error)
        # Of several places that of the class that was named speaks of its arguments.
        raise next((error for error in errors if " no " not in str(error)), errors[0])


def known_keys(values: Any, place: Place, key: str = "", default: type | None = None) -> Iterator[str]:
    """Yield all keys that can be set under the classes that were chosen; wrong parts are passed over."""
    spec = {"init_args": values} if place.fixed else as_spec(values)
    cls = place.base if place.fixed else default
    if not place.fixed and isinstance(name := spec.get("class_path"), str):
        try:
            cls = find_class(name, place.base, key)
        except UserError:
            return
    for name, parameter in place.arguments_of(cls).items() if cls is not None else ():
        inner = lookup(spec, f"init_args.{name}") or {}
        yield _join(key, name)
        for nested in places_of(parameter.annotation):
            chosen = _default_class(parameter)
            if isinstance(inner, Mapping | str) and (inner or nested.fixed or chosen):
                yield from known_keys(inner, nested, _join(key, name), chosen)


def _describe_unknown(error: _UnknownKeyError, layers: Layers, root: type) -> str:
    head, _, last = error.key.rpartition(".")
    keys = list(dict.fromkeys(known_keys(layers.values, Place(root, fixed=True))))
    valid = list(error.place.arguments_of(error.owner))
    by_name: dict[str, str] = {}
    for key in keys:
        by_name.setdefault(key.rpartition(".")[2], key)
    starting = [key for key in keys if key.startswith(f"{error.key}_")]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == last]
    meant = closest(error.key, starting or elsewhere, least=0)
    if meant is None:
        sibling = closest(last, valid, SURE)
        meant = by_name.get(closest(last, by_name, SURE) or "") if sibling is None else _join(head, sibling)
    question = f"; did you mean {meant}?" if meant else ""
    if error.place.fixed:
        return f"{layers.source(error.key)}{error.key}: no such option{question}"
    listed = f"valid: {', '.join(valid)}" if valid else "it takes none"
    return f"{layers.source(error.key)}{error.key}: {error.owner.__name__} has no argument {last}{question}\n{listed}"


def _default_class(parameter: inspect.Parameter) -> type | None:
    default = parameter.default
    return default if inspect.isclass(default) and default is not parameter.empty else None


def _listed(*bases: type) -> str:
    names = [name for base in bases for name, cls in classes_of(base).items() if cls is not base]
    more = ", or one registered by --plugins MODULE" if AttentionNormalization in bases else ""
    return f"valid: {', '.join([*names, ''])}the dotted path of a class{more}"


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(base)
    for cls in children:
        yield cls
        yield from _subclasses(cls)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)


def built(value: Any) -> Any:
    """Make what a checked value stands for, in lists too."""
    if isinstance(value, list):
        return [built(inner) for inner in value]
    return value.build() if isinstance(value, Spec) else value
