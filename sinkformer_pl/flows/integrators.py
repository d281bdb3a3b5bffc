"""Explicit steps of dx/dt = field(x)."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]
Integrator = Literal["euler", "rk4"]


def euler(field: Field, x: Tensor, step: float) -> Tensor:
    """Add one residual layer, x + step · field(x): with step 1 that of a transformer with nothing but attention."""
    return x + step * field(x)


def rk4(field: Field, x: Tensor, step: float) -> Tensor:
    """Take one step of the classical Runge-Kutta method, of order 4."""
    k1 = field(x)
    k2 = field(x + step / 2 * k1)
    k3 = field(x + step / 2 * k2)
    k4 = field(x + step * k3)
    return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def integrate(field: Field, x: Tensor, *, time: float, steps: int, integrator: Integrator = "rk4") -> Tensor:
    """Follow the field.

    Args:
        field: (N, D) -> (N, D).
        x: (N, D), the start.
        time: how long, at least 0.
        steps: number of equal steps, at least 1.
        integrator: "euler" or "rk4".

    Returns:
        (steps + 1, N, D), without gradient.

    Raises:
        ValueError: an unknown integrator, `time` or `steps` out of range, particles that leave the finite numbers.
    """
    if integrator not in get_args(Integrator):
        raise ValueError(f"integrator must be one of {', '.join(get_args(Integrator))}, got {integrator!r}")
    if steps < 1 or time < 0:
        raise ValueError(f"steps must be at least 1 and time at least 0, got {steps} and {time}")
    advance = euler if integrator == "euler" else rk4
    path = [x.detach()]
    with torch.no_grad():
        for number in range(steps):
            path.append(advance(field, path[-1], time / steps))
            if not path[-1].isfinite().all():
                raise ValueError(
                    f"the particles are no finite numbers after step {number + 1} of {steps}: take more steps, less "
                    "time or a larger epsilon"
                )
    return torch.stack(path)
