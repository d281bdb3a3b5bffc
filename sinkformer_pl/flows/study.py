"""The experiments behind the theory: three flows from one start, and the heat limit."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from sinkformer_pl.flows.attention import Cost, Kernel, ParticleAttention
from sinkformer_pl.flows.functionals import (
    interaction_energy,
    jacobian_asymmetry,
    transport_energy,
    wasserstein_gradient,
)
from sinkformer_pl.flows.heat import (
    Mixture,
    fitted_order,
    follow_heat,
    heat_error,
    limit_slope,
    measured_slope,
)
from sinkformer_pl.flows.integrators import Integrator, integrate

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

ENERGIES = {"F0": interaction_energy, "Finf": transport_energy}

DRIFTS: tuple[tuple[Kernel, Cost], ...] = (("sinkhorn", "l2"), ("softmax", "l2"), ("softmax", "dot"))

DOT_FLOOR = 0.1
"""Smallest epsilon, in variances, at which softmax of dot products is put on a grid, of 1 / epsilon^1.5 points."""


@dataclass(frozen=True)
class FlowSettings:
    """Particles in the plane that follow their own attention.

    Attributes:
        particles: how many, at least 2.
        std: standard deviation of the Gaussian that the start is drawn from.
        query: W_Q, 2 columns.
        key: W_K, of the same shape.
        value: W_V, 2 x 2; null is -W_Q^T W_K / epsilon, the descent.
        cost: dot or l2.
        epsilon: temperature of the scores.
        time: how long.
        steps: how many.
        integrator: euler or rk4.
    """

    particles: int = 40
    std: float = 0.8
    query: list[list[float]] = field(default_factory=lambda: [[1.0, 0.0], [0.0, 1.0]])
    key: list[list[float]] = field(default_factory=lambda: [[1.0, 0.0], [0.0, -1.0]])
    value: list[list[float]] | None = None
    cost: Cost = "dot"
    epsilon: float = 1.0
    time: float = 2.0
    steps: int = 100
    integrator: Integrator = "rk4"

    def __post_init__(self) -> None:
        _require_positive("flow", std=self.std, epsilon=self.epsilon, time=self.time)
        _require_counts("flow", 2, particles=self.particles)
        _require_counts("flow", 1, steps=self.steps)


@dataclass(frozen=True)
class HeatSettings:
    """The heat limit, as epsilon goes to 0.

    Attributes:
        std: of the Gaussian whose drift is measured on a grid.
        drift_epsilons: temperatures there.
        centres: of the mixture of Gaussians that particles start from.
        width: standard deviation of each of them.
        time: how long particles follow the drift.
        particles: numbers of them.
        epsilons: temperatures, at least 2.
    """

    std: float = 1.0
    drift_epsilons: list[float] = field(default_factory=lambda: [0.0125 * 2**k for k in range(7)])
    centres: list[float] = field(default_factory=lambda: [-1.0, 1.0])
    width: float = 0.4
    time: float = 0.5
    particles: list[int] = field(default_factory=lambda: [50, 100, 200, 400])
    epsilons: list[float] = field(default_factory=lambda: [0.025 * 2**k for k in range(5)])

    def __post_init__(self) -> None:
        _require_positive("heat", std=self.std, width=self.width, time=self.time)
        if not self.particles:
            raise ValueError("heat.particles must be one number or more, got none")
        _require_counts("heat", 2, particles=min(self.particles))
        for name, values in (("epsilons", self.epsilons), ("drift_epsilons", self.drift_epsilons)):
            if len(set(values)) < 2 or not all(0 < value < math.inf for value in values):
                raise ValueError(f"heat.{name} must be two or more different positive numbers, got {values}")
        if not self.centres or not all(math.isfinite(centre) for centre in self.centres):
            raise ValueError(f"heat.centres must be one or more finite numbers, got {self.centres}")


@dataclass(frozen=True)
class Flow:
    """Path of the particles under one kernel, and its measures.

    Attributes:
        kernel: of the attention.
        path: (steps + 1, N, 2).
        times: (steps + 1,).
        energies: F0 and Finf along the path, (steps + 1,) each.
        asymmetry: of the Jacobian at the start.
        distances: from minus the gradient of F0 and of Finf at the start, relative to the gradient.
        marginal_error: largest distance of a column sum from 1 at the start.
    """

    kernel: Kernel
    path: Tensor
    times: Tensor
    energies: dict[str, Tensor]
    asymmetry: float
    distances: dict[str, float]
    marginal_error: float


@dataclass(frozen=True)
class Heat:
    """Errors in the heat limit, and the particles at its end.

    Attributes:
        drift_errors: by kernel and cost, from epsilon to the relative error of the drift's slope on the grid.
        errors: by number of particles, from epsilon to the distance from the solution.
        start: where particles begin.
        solution: of the heat equation.
        final: particles at the end, (n, 1), for the largest n and the smallest epsilon.
    """

    drift_errors: dict[tuple[Kernel, Cost], dict[float, float]]
    errors: dict[int, dict[float, float]]
    start: Mixture
    solution: Mixture
    final: Tensor

    def drift_order(self, kernel: Kernel) -> float:
        """Fit the order in epsilon of the drift's error with the l2 cost."""
        return _order(self.drift_errors[kernel, "l2"])

    def order(self, particles: int) -> float:
        """Fit the order in epsilon of the distance from the solution."""
        return _order(self.errors[particles])


def follow_attention(settings: FlowSettings, seed: int) -> list[Flow]:
    """Follow each kernel from the same start.

    Args:
        settings: of particles, attention and integrator.
        seed: of the start.

    Raises:
        ValueError: matrices that don't fit, or a flow that breaks off.
    """
    attention = _attention(settings)
    generator = torch.Generator().manual_seed(seed)
    start = settings.std * torch.randn(settings.particles, 2, dtype=torch.float64, generator=generator)
    return [_follow(attention.under(kernel), start, settings) for kernel in KERNELS]


def _attention(settings: FlowSettings) -> ParticleAttention:
    query, key, epsilon = _matrix(settings.query, "query"), _matrix(settings.key, "key"), settings.epsilon
    if settings.value is None:
        value = ParticleAttention.descent(query, key, epsilon=epsilon).value
    else:
        value = _matrix(settings.value, "value")
    return ParticleAttention(query, key, value, "sinkhorn", settings.cost, epsilon)


def _matrix(rows: list[list[float]], name: str) -> Tensor:
    if not rows or any(len(row) != 2 for row in rows):
        raise ValueError(f"flow.{name} must be a list of rows of 2 numbers, such as [[1, 0], [0, 1]], got {rows}")
    return torch.tensor(rows, dtype=torch.float64)


def _follow(attention: ParticleAttention, start: Tensor, settings: FlowSettings) -> Flow:
    path = integrate(attention, start, time=settings.time, steps=settings.steps, integrator=settings.integrator)
    velocity, distances = attention(start), {}
    for name, energy in ENERGIES.items():
        gradient = wasserstein_gradient(partial(energy, attention), start)
        distances[name] = float((velocity + gradient).norm() / gradient.norm())
    return Flow(
        kernel=attention.kernel,
        path=path,
        times=torch.linspace(0, settings.time, settings.steps + 1, dtype=torch.float64),
        energies={name: torch.stack([energy(attention, x) for x in path]) for name, energy in ENERGIES.items()},
        asymmetry=jacobian_asymmetry(attention, start),
        distances=distances,
        marginal_error=float((attention.weights(start).sum(0) - 1).abs().max()),
    )


def reach_heat_limit(settings: HeatSettings) -> Heat:
    """Measure the drift on a grid, and particles against the heat equation.

    Args:
        settings: of both.

    Raises:
        ValueError: Sinkhorn does not converge.
    """
    start = Mixture(tuple(settings.centres), settings.width)
    solution = start.after(settings.time)
    errors: dict[int, dict[float, float]] = {}
    for particles in sorted(settings.particles):
        for epsilon in sorted(settings.epsilons, reverse=True):
            final = follow_heat(start, particles=particles, epsilon=epsilon, time=settings.time)
            errors.setdefault(particles, {})[epsilon] = heat_error(final, solution)
    return Heat(
        drift_errors={
            (kernel, cost): {
                epsilon: drift_error(kernel, settings.std, epsilon, measured_slope(kernel, cost, settings.std, epsilon))
                for epsilon in sorted(settings.drift_epsilons)
                if (kernel, cost) != ("softmax", "dot") or epsilon >= DOT_FLOOR * settings.std**2
            }
            for kernel, cost in DRIFTS
        },
        errors=errors,
        start=start,
        solution=solution,
        final=final,
    )


def drift_error(kernel: Kernel, std: float, epsilon: float, slope: float) -> float:
    """Compute the relative error of the drift (1 - slope) x / epsilon from its limit with the l2 cost."""
    return abs((1 - slope) / epsilon / limit_slope(kernel, std) - 1)


def _require_positive(group: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{group}.{name} must be positive and finite, got {value}")


def _require_counts(group: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{group}.{name} must be at least {least}, got {value}")


def _order(errors: dict[float, float]) -> float:
    return fitted_order(list(errors), list(errors.values()))
