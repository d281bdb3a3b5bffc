"""Factories as plain data, so that a checkpoint holds no objects: {"class_path": ..., "init_args": {...}}."""

import ast
import functools
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin

from sinkformer_pl.errors import UserError

Spec = dict[str, Any]
"""{"class_path": dotted path, "init_args": plain arguments}: the form that YAML files and checkpoints share."""


def describe(factory: Callable[..., Any]) -> Spec:
    """Return the spec of a class, or of a `functools.partial` of one, with its defaults filled in.

    Arguments that are factories themselves are described in turn; arguments without a default that the caller of the
    factory supplies are left out.

    Raises:
        UserError: an abstract class.
        TypeError: not a class or a partial of one (a lambda can't be saved), or an argument that isn't plain data.
    """
    if isinstance(factory, functools.partial):
        positional, given, cls = factory.args, factory.keywords, factory.func
    else:
        positional, given, cls = (), {}, factory
    if not inspect.isclass(cls) or positional:
        raise TypeError(f"expected a class or functools.partial(class, name=value, ...), got {factory!r}")
    if inspect.isabstract(cls):
        raise UserError(abstract(cls))
    parameters = inspect.signature(cls).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    arguments = {name: plain(value, f"{cls.__name__}.{name}") for name, value in {**defaults, **given}.items()}
    return {"class_path": public_path(cls), "init_args": arguments}


def abstract(cls: type) -> str:
    """Say that a class can't be used, and why."""
    missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
    return f"{cls.__name__} is abstract, it lacks {missing}: write that, or name a subclass that has it"


def as_factory(factory: Callable[..., Any] | Mapping[str, Any], base: type | tuple[type, ...]) -> Callable[..., Any]:
    """Return the factory itself, or the one that a spec stands for.

    A spec's class is imported, which runs its module's code. A spec among its arguments must be of the class that the
    argument's annotation names, such as `Callable[[], Something]`.

    Args:
        factory: a class, a partial, or a spec.
        base: what the factory must make an instance of, or several classes, of any of which.

    Raises:
        UserError: the class can't be imported, or an argument that is a spec has no such annotation.
        TypeError: it isn't a `base`.
    """
    if not isinstance(factory, Mapping):
        return factory
    cls = import_class(factory["class_path"])
    if not issubclass(cls, base):
        kinds = " or ".join(kind.__name__ for kind in (base if isinstance(base, tuple) else (base,)))
        raise TypeError(f"{factory['class_path']} is no {kinds}")
    given = {**(factory.get("init_args") or {}), **(factory.get("dict_kwargs") or {})}
    arguments = {
        name: as_factory(value, _made_by(cls, name)) if isinstance(value, Mapping) and "class_path" in value else value
        for name, value in given.items()
    }
    return functools.partial(cls, **arguments)


def _made_by(cls: type, name: str) -> type:
    """Return what a factory makes that is an argument of a class."""
    parameter = parameters_of(cls).get(name)
    annotation = None if parameter is None else parameter.annotation
    for hint in (annotation, *get_args(annotation)):
        if get_origin(hint) is Callable and inspect.isclass(made := get_args(hint)[-1]):
            return made
    # To call whatever a checkpoint names would be to run what its author likes.
    raise UserError(
        f"{cls.__name__}.{name} is given a class, but doesn't say which it takes: annotate it, such as "
        f"{name}: Callable[[], nn.Module]"
    )


def with_defaults(values: Mapping[str, Any], cls: type | None = None) -> dict[str, Any]:
    """Fill in defaults: what classes take now and didn't when the values were saved.

    Args:
        values: plain data, in which specs are filled in.
        cls: a class whose arguments the values are; those that they lack are filled in, too.

    Raises:
        UserError: a class can't be imported.
    """
    lacking = {} if cls is None else describe(cls)["init_args"]
    return lacking | {name: _filled(value) for name, value in values.items()}


def _filled(value: Any) -> Any:
    if not (isinstance(value, Mapping) and "class_path" in value):
        return value
    return describe(functools.partial(import_class(value["class_path"]), **with_defaults(value.get("init_args") or {})))


def readable(spec: Mapping[str, Any]) -> str:
    """Write a spec as a call: "Sinkhorn(n_iters=3)". Words are left out where they are the default."""
    try:
        parameters = parameters_of(import_class(spec["class_path"]))
    except UserError:
        parameters = {}
    arguments = ", ".join(
        f"{name}={value}"
        for name, value in (spec.get("init_args") or {}).items()
        if not (isinstance(value, str) and name in parameters and value == parameters[name].default)
    )
    return f"{spec['class_path'].rpartition('.')[2]}({arguments})"


def read_calls(text: str) -> list[Spec]:
    """Read specs that are written as calls, as `readable` does: "Softmax, Sinkhorn(n_iters=21), my_module.MyNorm".

    A bare word among the arguments is a text, as in YAML, but for true, false, null and inf. So is a call: it is read
    where it is used.

    Raises:
        ValueError: it is something else.
    """
    try:
        listed = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError as error:
        raise ValueError(text) from error
    if not isinstance(listed, ast.List):
        raise ValueError(text)
    return [_read_call(node) for node in listed.elts]


def _read_call(node: ast.expr) -> Spec:
    called, keywords = (node.func, node.keywords) if isinstance(node, ast.Call) and not node.args else (node, [])
    path = ast.unparse(called)
    names = [*path.split("."), *(keyword.arg or "**" for keyword in keywords)]
    if not all(name.isidentifier() for name in names):
        raise ValueError(ast.unparse(node))
    return {"class_path": path, "init_args": {str(keyword.arg): _read_value(keyword.value) for keyword in keywords}}


def _read_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None, "inf": float("inf")}.get(node.id, node.id)
    if isinstance(node, ast.Call):
        _read_call(node)
        return ast.unparse(node)
    return ast.literal_eval(node)


def same_class(one: str, other: str) -> bool:
    """Tell whether two names may be of one class: a short name and a path, or public and full path of one package."""
    (head, _, name), (other_head, _, other_name) = one.rpartition("."), other.rpartition(".")
    same_package = head.partition(".")[0] == other_head.partition(".")[0]
    return name == other_name and (not head or not other_head or same_package)


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return what a class takes, by name; behind its **kwargs are its parents' parameters.

    Left out are those of the parents that its own `__init__` gives them. Annotations are evaluated where they can be.
    """
    found: dict[str, inspect.Parameter] = {}
    given: set[str] = set()
    for ancestor in cls.__mro__:
        parameters = _signature(ancestor).values()
        named = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        # A required parameter of a parent is given by position.
        inherited = {n: p for n, p in named.items() if ancestor is cls or (n not in given and p.default is not p.empty)}
        found |= {n: p for n, p in inherited.items() if n not in found}
        if len(named) == len(parameters):
            break
        given |= _given_to_parents(ancestor)
    return found


def _signature(cls: type) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(cls, eval_str=True).parameters
    except NameError:  # An annotation that only a type checker can resolve.
        return inspect.signature(cls).parameters
    except ValueError:  # A class of C.
        return {}


def _given_to_parents(cls: type) -> set[str]:
    """Read the names of the arguments in `super().__init__(name=...)` off the source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))  # type: ignore[misc]
    except (OSError, TypeError, SyntaxError):
        return set()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    to_parents = [call for call in calls if ast.unparse(call.func) == "super().__init__"]
    return {keyword.arg for call in to_parents for keyword in call.keywords if keyword.arg is not None}


def import_class(path: str) -> type:
    """Import a class by its dotted path.

    Raises:
        UserError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"can't import {path} ({error}); name its module with --plugins or install its package"
        ) from error
    if not inspect.isclass(cls):
        raise UserError(f"{path} is no class")
    return cls


def public_path(cls: type) -> str:
    """Return the shortest dotted path of a class among the modules it lives in: files may move, public names stay.

    A name that a module makes up on demand (PEP 562) isn't one of its own: checkpoints keep the paths they have.
    """
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if module in sys.modules and vars(sys.modules[module]).get(cls.__name__) is cls:
            return f"{module}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def plain(value: Any, name: str) -> Any:
    """Return a value as plain data; classes and partials of them as specs.

    Args:
        value: the value.
        name: of what it is given to, for the message.

    Raises:
        TypeError: it is none.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item, name) for key, item in value.items()}
    if inspect.isclass(value) or isinstance(value, functools.partial):
        return describe(value)
    raise TypeError(
        f"{name}={value!r} is no plain data (numbers, strings, lists, classes), so a checkpoint can't hold it"
    )
