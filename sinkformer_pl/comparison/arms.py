"""The normalizations that are compared, as they are written on a command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import read_calls, same_class


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


def read_arms(text: str, configured: Mapping[str, Any]) -> list[Arm]:
    """Read a list such as "Softmax, Sinkhorn(n_iters=21), my_module.MyNorm".

    Args:
        text: names, with arguments in parentheses where they aren't the defaults.
        configured: the configuration's normalization, {"class_path", "init_args"}. An arm of the same class without
            arguments of its own has those.

    Returns:
        Two arms or more, all different; the first is the baseline. Nobody has looked whether the classes exist.

    Raises:
        UserError: it can't be read, names fewer than two, or one twice.
    """
    try:
        calls = read_calls(text)
    except ValueError:
        raise UserError(
            f"--normalizations {text}: expected names with commas between, such as 'Softmax,Sinkhorn(n_iters=21)'"
        ) from None
    arms = []
    for call in calls:
        same = same_class(call["class_path"], str(configured.get("class_path")))
        arguments = call["init_args"] or (same and configured.get("init_args")) or {}
        arms.append(Arm(call["class_path"], arguments))
    labels = [arm.label for arm in arms]
    if repeated := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise UserError(f"--normalizations {text}: {repeated[0]} stands there twice; name each once")
    if len(arms) < 2:
        raise UserError(f"--normalizations {text}: give two or more to compare")
    return arms
