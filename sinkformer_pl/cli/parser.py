"""The parser, whose errors are lines for users."""

import argparse
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any, NoReturn, get_args

import torch
from jsonargparse import Namespace, set_parsing_settings
from pytorch_lightning.cli import LightningArgumentParser

from sinkformer_pl.cli.messages import condense, not_settings, root_cause
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import parameters_of

# Of what runs commands or code nothing is even imported.
set_parsing_settings(import_path_denylist=[])


class Parser(LightningArgumentParser):
    """Lightning's, with one line for a wrong argument, and classes alone behind every class_path."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse as jsonargparse does, which would later call a function that a file or a checkpoint names."""
        config = super().parse_args(*args, **kwargs)
        command = config.get("subcommand")
        given, options = config[command] if command else config, self._options()
        for group in dict.fromkeys(option.partition(".")[0] for option in options if "." in option):
            if given.get(group) is not None and not isinstance(given[group], Namespace):
                raise UserError(not_settings(group, given[group], options))
        _require_classes(given)
        _require_values(given)
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError."""
        if not self.exit_on_error:
            # A parser within the parser, for the arguments of one class: the outer one adds its key to the message.
            super().error(message, ex)
        if ex is not None and isinstance(cause := root_cause(ex), UserError):
            # A checkpoint's configuration, parsed within: its error is said already.
            raise cause
        raise UserError(condense(message, self._options()))

    def _options(self) -> list[str]:
        """The options of it and of its commands, without their dashes."""
        parsers = [self, *(sub for action in self._actions for sub in _subparsers(action))]
        return [
            option.lstrip("-") for parser in parsers for action in parser._actions for option in action.option_strings
        ]


def as_plain(value: Any) -> Any:
    """A part of a configuration in which what a YAML file can't hold is written as text, as the parser reads it."""
    if isinstance(value, Namespace):
        for name, inner in vars(value).items():
            value[name] = as_plain(inner)
    elif isinstance(value, dict):
        return {name: as_plain(inner) for name, inner in value.items()}
    elif isinstance(value, list):
        return [as_plain(inner) for inner in value]
    elif isinstance(value, torch.device):
        return str(value)
    return value


def _require_classes(value: Any, key: str = "") -> None:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        if isinstance(path := value.get("class_path"), str) and not _is_class(path):
            raise UserError(f"{key} {path}: this is no class; give the dotted path of one")
        for name, inner in value.items():
            _require_classes(inner, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_classes(inner, key)


def _require_values(value: Any, key: str = "") -> None:
    """Refuse null where a class says that it takes something else; the parser lets it pass."""
    if isinstance(value, list):
        for inner in value:
            _require_values(inner, key)
    if not isinstance(value, Namespace):
        return
    arguments = value.get("init_args")
    if isinstance(arguments, Namespace):
        parameters = parameters_of(pkgutil.resolve_name(value["class_path"]))
        for name, inner in vars(arguments).items():
            parameter = parameters.get(name)
            if inner is None and parameter is not None and not _takes_null(parameter):
                raise UserError(f"{key}.{name} null: give a value, or leave it out; its default is {parameter.default}")
    for name, inner in vars(value).items():
        _require_values(inner, key if name == "init_args" else f"{key}.{name}".lstrip("."))


def _takes_null(parameter: inspect.Parameter) -> bool:
    # One without a default that wasn't given is null, too.
    if parameter.default in (None, parameter.empty):
        return True
    kinds = get_args(parameter.annotation) or (parameter.annotation,)
    return not any(kind in (int, float, bool, str) for kind in kinds) or type(None) in kinds


def _is_class(path: str) -> bool:
    try:
        return inspect.isclass(pkgutil.resolve_name(path))
    except (ImportError, AttributeError, ValueError):
        return False


def _subparsers(action: argparse.Action) -> list[argparse.ArgumentParser]:
    return list(action.choices.values()) if isinstance(action, argparse._SubParsersAction) else []
