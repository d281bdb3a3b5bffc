"""Names for normalizations, and the modules of users that bring their own."""

import importlib
import inspect
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from sinkformer_pl.errors import UserError
from sinkformer_pl.normalizations.contract import AttentionNormalization

ENTRY_POINT_GROUP = "sinkformer_pl.plugins"
"""Installed packages name their modules under this entry-point group; they are imported before a command runs."""

_registered: dict[str, type[AttentionNormalization]] = {}

Normalization = TypeVar("Normalization", bound=type[AttentionNormalization])


def register(cls: Normalization) -> Normalization:
    """Make a normalization known under its class name, for the command line and `registered()`.

    A class decorator. The class can then be chosen by `--model.normalization NAME`, once its module is imported
    (`--plugins`).

    Raises:
        TypeError: not a concrete subclass of `AttentionNormalization`.
        ValueError: the name belongs to another class.
    """
    if not (inspect.isclass(cls) and issubclass(cls, AttentionNormalization)):
        raise TypeError(f"register takes a subclass of AttentionNormalization or ScoreNormalization, got {cls!r}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"{cls.__name__} can't be registered before it defines {missing}")
    known = _registered.get(cls.__name__)
    if known is not None and _path(known) != _path(cls):
        raise ValueError(f"{cls.__name__} is taken by {_path(known)}; give your class another name")
    _registered[cls.__name__] = cls
    return cls


def registered() -> dict[str, type[AttentionNormalization]]:
    """Return every registered normalization by its name: ours by the alphabet, then others as they were registered."""
    ours = {name: cls for name, cls in _registered.items() if cls.__module__.startswith("sinkformer_pl.")}
    return {name: ours[name] for name in sorted(ours, key=str.lower)} | _registered


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Import the modules that installed packages announce as entry points, then the given ones.

    Args:
        modules: dotted names, importable from the current folder or the environment, or files, `./my_norm.py`.
            Importing runs their code. A file's folder becomes importable, and its module's name is that of the file.

    Raises:
        UserError: a module can't be found, or importing it fails.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()
    for module in modules:
        try:
            if module.endswith(".py"):
                _import_file(module)
            else:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise UserError(f"--plugins {module}: importing it failed: {error}") from error
            raise UserError(
                f"--plugins {module}: no module of this name; give a dotted name that Python can import from here, "
                f"or a file, ./{module}.py"
            ) from None
        except UserError:
            raise
        except Exception as error:  # A user's module can raise anything.
            raise UserError(f"--plugins {module}: importing it failed: {type(error).__name__}: {error}") from error


def _import_file(module: str) -> None:
    path = Path(module).absolute()
    if not path.is_file():
        raise UserError(f"--plugins {module}: no such file; give its path from {Path.cwd()}, or a module's dotted name")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    found = importlib.import_module(path.stem)
    if not getattr(found, "__file__", None) or not path.samefile(found.__file__):  # type: ignore[arg-type]
        raise UserError(
            f"--plugins {module}: {path.stem} is the name of another module, {getattr(found, '__file__', 'built in')}; "
            "rename the file"
        )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
