"""Numbers of a module that are fixed, or learned with one value for each head."""

from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn


class PerHead:
    """Declare a number of a module: fixed, or learned for each head from that value on.

    Declare it in the body of the class, and assign the number in `__init__`, after `learned`. Reading it then gives the
    number, or once `build` has made the parameter, a tensor (H,) of what the heads have learned:

        class Entmax(ScoreNormalization):
            alpha = PerHead("alpha_logit", to_raw=..., from_raw=...)

            def __init__(self, alpha: float = 1.5, learned: bool = False) -> None:
                super().__init__()
                self.learned = learned
                self.alpha = alpha

    Args:
        parameter: name of the parameter (H,) that is trained.
        to_raw: the value of the parameter at the start, for the number.
        from_raw: the value in use, for the parameter and the number at the start.
    """

    def __init__(
        self,
        parameter: str,
        *,
        to_raw: Callable[[float], float] = float,
        from_raw: Callable[[Tensor, float], Tensor] = lambda raw, initial: raw,
    ) -> None:
        self.parameter, self.to_raw, self.from_raw = parameter, to_raw, from_raw

    def __set_name__(self, owner: type, name: str) -> None:
        """Keep the name under which a class declares it."""
        self.name, self.slot = name, f"initial_{name}"

    def __set__(self, module: nn.Module, initial: float) -> None:
        """Set the number, or the value from which it is learned."""
        if not isinstance(module.learned, bool):
            raise ValueError(f"{type(module).__name__}: learned must be True or False, got {module.learned!r}")
        if self.slot not in vars(module):
            module.register_parameter(self.parameter, None)
        vars(module)[self.slot] = initial

    @overload
    def __get__(self, module: None, owner: type) -> "PerHead": ...
    @overload
    def __get__(self, module: nn.Module, owner: type) -> Any: ...
    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        """Read the number, or the tensor (H,) of a learned one.

        Raises:
            RuntimeError: it is learned, and `build` wasn't called.
        """
        if module is None:
            return self
        if self.slot not in vars(module):
            raise AttributeError(f"{owner.__name__}.{self.name} isn't set")
        initial = vars(module)[self.slot]
        if not module.learned:
            return initial
        raw = getattr(module, self.parameter)
        if raw is None:
            raise unbuilt(module, self.parameter)
        return self.from_raw(raw, initial)

    def build(self, module: nn.Module, num_heads: int) -> None:
        """Make the parameter (H,), if the number is learned."""
        if module.learned:
            initial = self.to_raw(vars(module)[self.slot])
            setattr(module, self.parameter, nn.Parameter(torch.full((num_heads,), initial)))


def numbers_per_head(cls: type) -> Iterator[PerHead]:
    """Find the numbers that a class and its parents declare."""
    for parent in cls.__mro__:
        yield from (value for value in vars(parent).values() if isinstance(value, PerHead))


def unbuilt(module: nn.Module, parameter: str) -> RuntimeError:
    """Say that a module lacks a parameter that `build` makes."""
    return RuntimeError(
        f"{type(module).__name__} has no {parameter} yet, which it learns: call its build(num_heads, head_dim) first, "
        "as an attention layer does"
    )
