"""Settings of a command: layers of them, merged once into one plain mapping that knows where each value is from.

A class and its arguments is {"class_path": name, "init_args": {...}}. A higher layer replaces the class, or its
arguments one by one. Arguments of a replaced class go to "replaced", where the new class may find those that it takes.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sinkformer_pl.errors import UserError, did_you_mean
from sinkformer_pl.factories import read_calls, same_class

MOST_VALUES = 10_000
"""Limit of a YAML file: aliases of aliases make a small one grow without end."""

SPEC_KEYS = {"class_path", "init_args", "dict_kwargs", "replaced"}

LISTS = ("plugins", "trainer.callbacks", "trainer.logger", "trainer.plugins")
"""Settings of which a user may want several; as flags they add with `+=`."""


class Layers:
    """One mapping of settings.

    Attributes:
        values: plain data, as it was written: numbers from the command line are text.
        sources: where each value is from, by its dotted key.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def add(self, values: Mapping[str, Any], source: str) -> None:
        """Lay a mapping over what is there."""
        self.values = _merged(self.values, values)
        self.sources.update((key, source) for key in _keys(values))

    def add_flags(self, flags: Sequence[tuple[str, str]]) -> None:
        """Lay flags over what is there: dotted keys, with a `+` where they append, and their values as text.

        A class comes before its arguments, wherever both stand on the line.
        """
        for key, text in _by_depth(flags):
            *path, last = key.removesuffix("+").split(".")
            value = _structured(key, text)
            self.values = _set(self.values, [*path, last], value, append=key.endswith("+"))
            self.sources[key.removesuffix("+")] = f"--{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key, as it was written."""
        value = lookup(self.values, key)
        return default if value is None else value

    def source(self, key: str) -> str:
        """Return "--config FILE: " for a value from a file, else ""."""
        while key and key not in self.sources:
            key = key.rpartition(".")[0]
        source = self.sources.get(key, "")
        return f"{source}: " if source.startswith("--config ") else ""


def lookup(values: Any, key: str) -> Any:
    """Return the value of a dotted key in nested mappings, None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def read_flags(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split arguments into the YAML files of `--config` and all other flags with their values.

    Raises:
        UserError: an argument that is no flag, a flag without a value, or one of `LISTS` that is given twice.
    """
    configs, others = split_off(argv, ("--config", "-c"))
    flags = []
    rest = iter(others)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if argument.endswith((".yaml", ".yml")) and not argument.startswith("-"):
            raise UserError(f"{argument}: a configuration is given by --config {argument}")
        if not flag.startswith("--"):
            raise UserError(f"{argument}: options begin with --, and each has one value")
        flags.append((flag[2:], value if equals else _following(rest, flag)))
    for name in LISTS:
        if [flag for flag, _ in flags].count(name) > 1:
            raise UserError(f"--{name} stands there twice, of which the last would count; add with --{name}+=VALUE")
    return configs, flags


def split_off(argv: Sequence[str], options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values of some flags (`--x value` or `--x=value`), and all other arguments.

    Raises:
        UserError: the last argument is such a flag, without a value.
    """
    values, others = [], []
    rest = iter(argv)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option in options:
            values.append(value if equals else _following(rest, option))
        else:
            others.append(argument)
    return values, others


def _following(rest: Iterator[str], flag: str) -> str:
    value = next(rest, None)
    if value is None:
        raise UserError(f"{flag} needs a value")
    return value


def read_yaml(path: str) -> dict[str, Any]:
    """Read the settings of a YAML file.

    Raises:
        UserError: it is missing, broken, empty or no mapping; names file and line.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        beside = [str(other) for other in sorted(Path(path).parent.glob("*.yaml"))]
        raise UserError(
            f"--config {path}: no such file{did_you_mean(path, beside)}; give a path from the folder in which you are"
        ) from None
    except IsADirectoryError:
        raise UserError(f"--config {path}: a folder; give a .yaml file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--config {path}: can't be read ({cause}); make it readable, as UTF-8") from None
    except RecursionError:
        raise UserError(f"--config {path}: it is nested too deep; write lines 'key: value'") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", "no valid YAML"))
        remedy = "write plain values, without tags" if "tag" in problem else "correct the YAML"
        raise UserError(f"--config {path}{line}: {problem}; {remedy}") from None
    if content is None:
        raise UserError(f"--config {path}: it is empty")
    if _is_larger(content, MOST_VALUES):
        raise UserError(
            f"--config {path}: more than {MOST_VALUES:,} values, or aliases that refer to themselves; shorten it"
        )
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected 'key: value' lines, found a {type(content).__name__}")
    return content


def module_names(value: Any) -> list[str]:
    """Split module names from "a,b", "[a, b]" or a list.

    Raises:
        UserError: it is something else.
    """
    parts = value.strip("[]").split(",") if isinstance(value, str) else value or []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"plugins {value}: expected names of modules")
    names = [name.strip(" '\"") for part in parts for name in part.split(",")]
    return [name for name in names if name]


def as_spec(value: Any) -> dict[str, Any]:
    """Write a class as {"class_path", "init_args"}: a name, a call, or arguments of the class of a lower layer."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            if value.endswith(")"):
                [value] = read_calls(value)
                return value
        return {"class_path": value}
    if isinstance(value, Mapping) and not value.keys() & SPEC_KEYS:
        return {"init_args": dict(value)}
    return dict(value)


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _merged(lower: Any, upper: Any) -> Any:
    if isinstance(upper, Mapping) and isinstance(lower, str) and not _is_class(upper):
        lower = as_spec(lower)
    if _is_class(lower) and isinstance(upper, str | Mapping):
        upper = as_spec(upper)
        if _is_class(upper) and not same_class(str(lower["class_path"]), str(upper["class_path"])):
            replaced = {**lower.get("replaced", {}), **_arguments(lower)}
            return {**upper, "replaced": replaced}
    elif isinstance(upper, str) and isinstance(lower, Mapping) and lower.keys() & {"init_args"}:
        upper = as_spec(upper)
    if not isinstance(lower, Mapping) or not isinstance(upper, Mapping):
        return upper
    return {**lower, **{key: _merged(lower[key], value) if key in lower else value for key, value in upper.items()}}


def _by_depth(flags: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sort flags by the depth of their keys; what belongs to a list that is added to stays in its order."""
    lists = [key.removesuffix("+") for key, _ in flags if key.endswith("+")]

    def depth(flag: tuple[str, str]) -> int:
        key = flag[0].removesuffix("+")
        return min(name.count(".") for name in (key, *lists) if f"{key}.".startswith(f"{name}."))

    return sorted(flags, key=depth)


def _arguments(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    return spec["init_args"] if isinstance(spec.get("init_args"), Mapping) else {}


def _set(values: Any, path: Sequence[str], value: Any, *, append: bool) -> Any:
    """Return the values with another one at the end of a path; on the way it enters arguments and last elements."""
    if not path:
        if not append:
            return _merged(values, value)
        listed = values if isinstance(values, list) else [] if values is None else [values]
        return [*listed, *(value if isinstance(value, list) else [value])]
    if isinstance(values, list) and values:
        return [*values[:-1], _set(values[-1], path, value, append=append)]
    if isinstance(values, str):
        values = as_spec(values)
    values = dict(values) if isinstance(values, Mapping) else {}
    if _is_class(values) and path[0] not in SPEC_KEYS:
        path = ["init_args", *path]
    return {**values, path[0]: _set(values.get(path[0]), path[1:], value, append=append)}


def _structured(key: str, text: str) -> Any:
    """Return a flag's text, as data if it is a list or a mapping; for a group also a YAML file's content."""
    if key in ("trainer", "model", "data") and text.endswith((".yaml", ".yml")):
        return read_yaml(text)
    if not text.startswith(("[", "{")) and text not in ("null", "~"):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values, those of a class's arguments as flags have them."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            key = prefix if name in ("init_args", "class_path") else f"{prefix}.{name}".lstrip(".")
            yield key
            yield from _keys(value, key)


def from_home(text: str) -> str:
    """Write out the ~ at the beginning of a path; a lone ~ is YAML's null."""
    return os.path.expanduser(text) if text.startswith("~/") else text


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, as the last one would count without a word, and ~/ is home."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        return from_home(super().construct_scalar(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _is_larger(content: Any, most: int) -> bool:
    """Tell whether it has more values than that, each counted as often as aliases repeat it."""
    waiting, found = [content], 0
    while waiting and found <= most:
        value = waiting.pop()
        found += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found > most
