"""Check settings against the signatures of the classes that they name, before anything is made of them.

A wrong key is looked for among all keys of the command; a wrong name of a class among those that its place takes.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sinkformer_pl.cli.layers import SPEC_KEYS, Layers, as_spec, closest, did_you_mean
from sinkformer_pl.cli.signatures import (
    Place,
    arguments_of,
    convert,
    places_of,
    read_text,
    takes_list,
    takes_null,
    takes_text,
)
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import abstract, describe, import_class, public_path
from sinkformer_pl.normalizations import AttentionNormalization, registered


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
        return arguments_of(self.cls, self.place.supplied or 0)[name].default

    def with_argument(self, name: str, value: Any) -> "Spec":
        """Return the same with another value of an argument."""
        return replace(self, arguments={**self.arguments, name: value})

    def build(self) -> Any:
        """Make an instance, or a factory where the place takes one."""
        arguments = {name: built(value) for name, value in self.arguments.items()}
        return self.cls(**arguments) if self.place.supplied is None else functools.partial(self.cls, **arguments)

    def plain(self) -> dict[str, Any]:
        """Return class and arguments as plain data, defaults filled in; the arguments alone if the place is fixed."""
        parameters = arguments_of(self.cls, self.place.supplied or 0)
        names = [name for name, p in parameters.items() if name in self.arguments or p.default is not p.empty]
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
    return _Check(Layers()).find(name, base, key)


class _UnknownKeyError(Exception):
    def __init__(self, key: str, owner: type, supplied: int, *, fixed: bool) -> None:
        self.key, self.owner, self.supplied, self.fixed = key, owner, supplied, fixed


class _Check:
    def __init__(self, layers: Layers) -> None:
        self.layers = layers

    def error(self, key: str, text: str) -> UserError:
        return UserError(f"{self.layers.source(key)}{text}")

    def spec(self, value: Any, place: Place, key: str, default: Any = None) -> Spec:
        """Check a class with its arguments; `default` is the class if none is named."""
        if place.fixed:
            cls, given, replaced, extra = self.fixed(value, place, key)
        else:
            cls, given, replaced, extra = self.chosen(value, place, key, default)
        parameters = arguments_of(cls, place.supplied or 0)
        linked: Mapping[str, str] = getattr(cls, "from_data", {})
        for name in given:
            if name in linked:
                raise self.error(
                    f"{key}.{name}", f"{key}.{name} can't be set: it follows from data.{linked[name]}; leave it out"
                )
            if name not in parameters:
                raise _UnknownKeyError(_join(key, name), cls, place.supplied or 0, fixed=place.fixed)
        arguments = {name: self.value(inner, parameters[name], _join(key, name)) for name, inner in given.items()}
        for name in replaced.keys() & parameters.keys() - given.keys() - linked.keys():
            try:
                arguments[name] = self.value(replaced[name], parameters[name], _join(key, name))
            except (UserError, _UnknownKeyError):  # It was meant for another class.
                continue
        missing = [
            _join(key, name)
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty and name not in arguments and name not in linked
        ]
        if missing:
            names = ", ".join(name.rpartition(".")[2] for name in missing)
            needs = "" if place.fixed else f"{cls.__name__} needs {names}; "
            raise self.error(key, f"{', '.join(missing)} missing: {needs}give it as a flag, or a --config that has it")
        # In the order of the signature, in which they are written.
        return Spec(cls, place, {n: arguments[n] for n in parameters if n in arguments} | dict(extra))

    def fixed(self, value: Any, place: Place, key: str) -> tuple[type, Mapping, Mapping, Mapping]:
        if not isinstance(value, Mapping):
            example = next(iter(arguments_of(place.base)))
            raise self.error(key, f"{key} {value}: expected settings, such as {key}.{example}")
        spec = value if value.keys() & {"class_path", "init_args"} else {"init_args": value}
        return place.base, spec.get("init_args") or {}, {}, {}

    def chosen(self, value: Any, place: Place, key: str, default: Any) -> tuple[type, Mapping, Mapping, Mapping]:
        spec = as_spec(value)
        if unknown := [name for name in spec if name not in SPEC_KEYS]:
            raise self.error(
                key,
                f"{key} {spec.get('class_path')}: its arguments stand beside class_path; put them under init_args: "
                f"{', '.join(map(str, unknown))}",
            )
        if "class_path" not in spec and default is None:
            raise self.error(
                key,
                f"{key}: no class is named; write class_path: NAME and init_args: below it, or give --{key} NAME"
                f"\n{_listed(place.base)}",
            )
        name = spec.get("class_path")
        cls = default if name is None else self.find(str(name), place.base, key)
        parts = [spec.get(part) or {} for part in ("init_args", "replaced", "dict_kwargs")]
        if not all(isinstance(part, Mapping) for part in parts):
            raise self.error(key, f"{key}.init_args: expected lines 'name: value'")
        return cls, parts[0], parts[1], parts[2]

    def find(self, name: str, base: type, key: str) -> type:
        """Find a class by its short name or its dotted path."""
        valid = classes_of(base)
        if "." not in name and name in valid:
            return valid[name]
        try:
            cls = import_class(name) if "." in name else None
        except UserError as error:
            missing = _missing_module(error)
            remedy = (
                f": Python finds no module {missing}; run from the folder that has it, or install it"
                if missing
                else did_you_mean(name.rpartition(".")[2], list(valid))
            )
            what = "this is no class" if "is no class" in str(error) else "no class of this name"
            raise self.error(key, f"{key} {name}: {what}{remedy}\n{_listed(base)}") from None
        abstracts = {c.__name__: c for c in [base, *_subclasses(base)]}
        cls = cls or abstracts.get(name)
        if cls is None:
            raise self.error(
                key, f"{key} {name}: no class of this name{did_you_mean(name, list(valid))}\n{_listed(base)}"
            )
        if not issubclass(cls, base):
            raise self.error(key, f"{key} {name}: this class is no {base.__name__}; give one that is\n{_listed(base)}")
        if inspect.isabstract(cls):
            raise self.error(key, f"{key} {abstract(cls)}")
        if cls is base and valid.keys() - {cls.__name__}:
            raise self.error(key, f"{key} {name}: this is what all of them are; give one\n{_listed(base)}")
        return cls

    def value(self, value: Any, parameter: inspect.Parameter, key: str) -> Any:
        """Check and convert the value of an argument."""
        hint, places = parameter.annotation, places_of(parameter.annotation)
        if places and isinstance(value, str) and not isinstance(text := read_text(value), str):
            value = text
        if value is None or (value in ("null", "~") and not places):
            optional = takes_null(parameter) and (parameter.default is not parameter.empty or not places)
            if not optional:
                default = "" if parameter.default is parameter.empty else f"; its default is {parameter.default}"
                raise self.error(key, f"{key} null: give a value, or leave it out{default}")
            return None
        if places and isinstance(value, list) and takes_list(hint):
            return [self.value(inner, parameter, key) for inner in value]
        named = isinstance(value, Mapping) or (isinstance(value, str) and not takes_text(hint))
        if places and (named or places[0].fixed):
            return self.class_of(value, places, parameter, key)
        if isinstance(value, Mapping) and "class_path" in value:
            raise self.error(key, f"{key} {value['class_path']}: no class can stand here; leave it out")
        try:
            return convert(value, hint)
        except ValueError as error:
            raise self.error(key, f"{key} {value}: expected {error}") from None

    def class_of(self, value: Any, places: Sequence[Place], parameter: inspect.Parameter, key: str) -> Spec:
        default = parameter.default if inspect.isclass(parameter.default) else None
        errors: list[Exception] = []
        for place in dict.fromkeys(places):
            try:
                return self.spec(value, place, key, default)
            except UserError as error:
                errors.append(error)
        # Of several places that of the class that was named speaks of its arguments.
        raise next((error for error in errors if " no " not in str(error)), errors[0])


def known_keys(values: Any, place: Place, key: str = "", default: Any = None) -> Iterator[str]:
    """Yield all keys that can be set under the classes that were chosen; wrong parts are passed over."""
    spec = as_spec(values) if not place.fixed else {"init_args": values}
    cls: type | None = place.base if place.fixed else default
    if not place.fixed and isinstance(name := spec.get("class_path"), str):
        try:
            cls = find_class(name, place.base, key)
        except UserError:
            return
    given = spec.get("init_args")
    for name, parameter in arguments_of(cls, place.supplied or 0).items() if cls is not None else ():
        inner = given.get(name) if isinstance(given, Mapping) else None
        yield _join(key, name)
        for nested in places_of(parameter.annotation):
            chosen = parameter.default if inspect.isclass(parameter.default) else None
            if (isinstance(inner, Mapping | str) or inner is None) and (inner or nested.fixed or chosen):
                yield from known_keys(inner or {}, nested, _join(key, name), chosen)


def _describe_unknown(error: _UnknownKeyError, layers: Layers, root: type) -> str:
    keys = list(dict.fromkeys(known_keys(layers.values, Place(root, fixed=True))))
    last = error.key.rpartition(".")[2]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == last]
    siblings = [_join(error.key.rpartition(".")[0], name) for name in arguments_of(error.owner, error.supplied)]
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)}
    by_name = dict(reversed(by_name.items()))
    if elsewhere:
        meant = f"; did you mean {closest(error.key, elsewhere, least=0)}?"
    else:
        meant = did_you_mean(error.key, siblings) or did_you_mean(error.key, keys)
        if not meant and (close := closest(last, by_name)):
            meant = f"; did you mean {by_name[close]}?"
    source = layers.source(error.key)
    if error.fixed:
        return f"{source}{error.key}: no such option{meant}"
    valid = [sibling.rpartition(".")[2] for sibling in siblings]
    listed = f"valid: {', '.join(valid)}" if valid else "it takes none"
    return f"{source}{error.key}: {error.owner.__name__} has no argument {last}{meant}\n{listed}"


def _listed(base: type) -> str:
    names = [name for name, cls in classes_of(base).items() if cls is not base]
    more = ", or one registered by --plugins MODULE" if base is AttentionNormalization else ""
    return f"valid: {', '.join([*names, ''])}the dotted path of a class{more}"


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(base)
    for cls in children:
        yield cls
        yield from _subclasses(cls)


def _missing_module(error: UserError) -> str | None:
    cause = error.__cause__
    return cause.name if isinstance(cause, ModuleNotFoundError) else None


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)


def built(value: Any) -> Any:
    """Make what a checked value stands for, in lists too."""
    if isinstance(value, list):
        return [built(inner) for inner in value]
    return value.build() if isinstance(value, Spec) else value
