"""Files and folders that an installed package carries, such as the weights of a model."""

from importlib.util import find_spec
from pathlib import Path

from sinkformer_pl.errors import UserError

PREFIX = "package:"


def locate(name: str | Path) -> str:
    """Return the path that "package:NAME/FILE" stands for, FILE of the installed package NAME; others are as they are.

    The package isn't imported.

    Raises:
        UserError: the package isn't installed, or has no such file or folder.
    """
    if not str(name).startswith(PREFIX):
        return str(name)
    package, _, inside = str(name).removeprefix(PREFIX).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name}: no package {package or '(no name)'} is installed: pip install {package}")
    path = Path(next(iter(spec.submodule_search_locations)), inside)
    if not path.exists():
        there = ", ".join(sorted(entry.name for entry in path.parent.glob("*"))) or "nothing"
        raise UserError(f"{name}: the package has no {inside}; in {path.parent} there is {there}")
    return str(path)
