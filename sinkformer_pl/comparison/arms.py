"""The normalizations that are compared, as they are written on a command line."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import as_factory, import_class, parameters_of, public_path
from sinkformer_pl.normalizations import AttentionNormalization, registered


@dataclass(frozen=True)
class Arm:
    """A normalization and the arguments that are given to it.

    Attributes:
        name: registered name, or dotted path.
        arguments: plain data; the others have their defaults.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return it as a call: "Softmax", "Sinkhorn(n_iters=3)"."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return self.name.rpartition(".")[2] + (f"({given})" if given else "")

    def flags(self) -> list[str]:
        """Return the flags that choose it."""
        flags = ["--model.normalization", self.name]
        for name, value in self.arguments.items():
            # As YAML, which the parser reads; infinity is .inf there.
            text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000).removesuffix("...\n").strip()
            flags += [f"--model.normalization.{name}", text]
        return flags

    def check(self) -> None:
        """Build it once.

        Raises:
            UserError: no such class, not a normalization, or an argument that it refuses.
        """
        path = _path(self.name)
        try:
            factory = as_factory({"class_path": path, "init_args": dict(self.arguments)}, AttentionNormalization)
        except TypeError as error:
            raise UserError(f"--normalizations {self.label}: {error}") from None
        valid = parameters_of(import_class(path))
        if unknown := [name for name in self.arguments if name not in valid]:
            takes = f"it takes {', '.join(valid)}" if valid else "it takes none"
            raise UserError(f"--normalizations {self.label}: it has no argument {unknown[0]}; {takes}")
        try:
            factory()
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"--normalizations {self.label}: {error}") from None


def read_arms(text: str, configured: Mapping[str, Any] | str | None) -> list[Arm]:
    """Read a list such as "Softmax, Sinkhorn(n_iters=21), my_module.MyNorm".

    Args:
        text: names, with arguments in parentheses where they aren't the defaults.
        configured: what the configuration says under `model.normalization`. An arm of the same class without
            arguments of its own has those.

    Returns:
        Two arms or more, all different; the first is what the others are compared with.

    Raises:
        UserError: it can't be read, names fewer than two, or one twice, or one that can't be built.
    """
    try:
        arms = [_arm(node) for node in _elements(text)]
    except (SyntaxError, ValueError):
        raise UserError(
            f"--normalizations {text}: expected names with commas between, such as 'Softmax,Sinkhorn(n_iters=21)'"
        ) from None
    arms = [_filled(arm, configured) for arm in arms]
    for arm in arms:
        arm.check()
    labels = [arm.label for arm in arms]
    if repeated := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise UserError(f"--normalizations {text}: {repeated[0]} stands there twice; name each once")
    if len(arms) < 2:
        raise UserError(f"--normalizations {text}: give two or more to compare")
    return arms


def _elements(text: str) -> list[ast.expr]:
    parsed = ast.parse(f"[{text}]", mode="eval").body
    if not isinstance(parsed, ast.List):
        raise ValueError
    return parsed.elts


def _arm(node: ast.expr) -> Arm:
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError
        arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        return Arm(_dotted(node.func), arguments)
    return Arm(_dotted(node))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError


def _value(node: ast.expr) -> Any:
    # A bare word is a text, as in YAML, but for YAML's own words.
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None, "inf": float("inf")}.get(node.id, node.id)
    return ast.literal_eval(node)


def _filled(arm: Arm, configured: Mapping[str, Any] | str | None) -> Arm:
    if arm.arguments or not isinstance(configured, Mapping) or "class_path" not in configured:
        return arm
    same = _path(arm.name) == _path(str(configured["class_path"]))
    return Arm(arm.name, configured.get("init_args") or {}) if same else arm


def _path(name: str) -> str:
    known = registered()
    if "." in name:
        return public_path(import_class(name))
    if name not in known:
        raise UserError(f"--normalizations {name}: no normalization of this name; there are {', '.join(known)}")
    return public_path(known[name])
