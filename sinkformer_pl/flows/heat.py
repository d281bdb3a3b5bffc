"""The heat limit: (x - ∫ k(x, y) y dmu(y)) / epsilon as epsilon goes to 0, on particles against the heat equation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sinkformer_pl.flows.attention import Cost, Kernel, ParticleAttention
from sinkformer_pl.flows.integrators import integrate


def heat_drift(attention: ParticleAttention, x: Tensor, log_mass: Tensor | None = None) -> Tensor:
    """Compute (x_i - ∫ k(x_i, y) y dmu(y)) / epsilon, (N, D).

    With the l2 cost, that of Sinkhorn is minus the Wasserstein gradient of F^inf, and tends to -1/2 grad log rho; that
    of softmax tends to -grad log rho.

    Args:
        attention: `ParticleAttention.smoothing`.
        x: (N, D), float64.
        log_mass: (N,), logarithms of masses that sum to 1; None is 1/N each.
    """
    return (x - attention(x, log_mass)) / attention.epsilon


def limit_slope(kernel: Kernel, std: float) -> float:
    """Return the slope of the drift of N(0, std²) as epsilon goes to 0 with the l2 cost; -grad log rho = x / std²."""
    return {"sinkhorn": 0.5, "softmax": 1.0}[kernel] / std**2


def gaussian_slope(kernel: Kernel, cost: Cost, std: float, epsilon: float) -> float:
    """Compute the slope r of ∫ k(x, y) y dmu(y) = r x for mu = N(0, std²), in closed form.

    Sinkhorn has the same under both costs, that of entropic optimal transport of a Gaussian to itself.

    Raises:
        ValueError: the exponential kernel, whose mean isn't linear in x.
    """
    variance = std**2
    if kernel == "sinkhorn":
        return (math.sqrt(variance**2 + epsilon**2 / 4) - epsilon / 2) / variance
    if kernel == "softmax":
        return variance / (variance + epsilon) if cost == "l2" else variance / epsilon
    raise ValueError(f"only softmax and sinkhorn have a slope, got {kernel!r}")


def gaussian_grid(std: float, epsilon: float, reach: float = 10) -> tuple[Tensor, Tensor]:
    """Make points and log masses of the trapezoidal rule for N(0, std²), as fine as the kernel asks for.

    Args:
        std: standard deviation.
        epsilon: temperature.
        reach: half of the width, in standard deviations.

    Returns:
        (N, 1) and (N,), float64.
    """
    half = math.ceil(2 * reach * std / min(std, math.sqrt(epsilon)))
    x = torch.linspace(-reach * std, reach * std, 2 * half + 1, dtype=torch.float64)
    return x[:, None], (-((x / std) ** 2) / 2).log_softmax(0)


def measured_slope(kernel: Kernel, cost: Cost, std: float, epsilon: float) -> float:
    """Measure `gaussian_slope` on a grid: the regression of the mean on x under the mass."""
    # Softmax of dot products looks std² / epsilon as far as x itself.
    reach = 10 + 6 * std**2 / epsilon if (kernel, cost) == ("softmax", "dot") else 10
    x, log_mass = gaussian_grid(std, epsilon, reach)
    mean = ParticleAttention.smoothing(1, epsilon, kernel, cost)(x, log_mass)
    return float((log_mass.exp() @ (x * mean)) / (log_mass.exp() @ x.square()))


@dataclass(frozen=True)
class Mixture:
    """Gaussians on the line, of equal weight and width. The heat equation only widens them.

    Attributes:
        centres: of the Gaussians.
        std: of each.
    """

    centres: tuple[float, ...] = (-1.0, 1.0)
    std: float = 0.4

    def after(self, time: float) -> "Mixture":
        """Solve d rho/dt = 1/2 Laplacian rho from here on."""
        return Mixture(self.centres, math.sqrt(self.std**2 + time))

    def density(self, x: Tensor) -> Tensor:
        """Compute the density, of the shape of x."""
        z = (x[..., None] - torch.tensor(self.centres, dtype=x.dtype)) / self.std
        return ((-z.square() / 2).exp() / (self.std * math.sqrt(2 * math.pi))).mean(-1)

    def quantiles(self, n: int) -> Tensor:
        """Find the n points that split the mass, at (i + 1/2) / n, in order, (n,), float64, by bisection."""
        wanted = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        centres = torch.tensor(self.centres, dtype=torch.float64)
        low, high = (torch.full_like(wanted, end) for end in (min(self.centres), max(self.centres)))
        low, high = low - 40 * self.std, high + 40 * self.std
        for _ in range(80):
            middle = (low + high) / 2
            below = torch.special.ndtr((middle[:, None] - centres) / self.std).mean(-1) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def heat_error(final: Tensor, solution: Mixture) -> float:
    """Compute the Wasserstein distance of order 2 from particles on the line to the n quantiles of the solution.

    Args:
        final: (n, 1).
        solution: of the heat equation.
    """
    return float((final[:, 0].sort().values - solution.quantiles(len(final))).square().mean().sqrt())


def follow_heat(start: Mixture, *, particles: int, epsilon: float, time: float, steps: int | None = None) -> Tensor:
    """Let particles at the quantiles of a measure follow the drift of Sinkhorn, by Runge-Kutta steps.

    Args:
        start: the measure at time 0.
        particles: how many.
        epsilon: temperature; the drift is right to an error of order epsilon.
        time: how long.
        steps: how many; None takes steps of at most epsilon / 2, which the drift's stiffness of 1 / epsilon asks for.

    Returns:
        (particles, 1), float64.
    """
    attention = ParticleAttention.smoothing(1, epsilon)
    steps = steps or max(1, math.ceil(2 * time / epsilon))
    return integrate(partial(heat_drift, attention), start.quantiles(particles)[:, None], time=time, steps=steps)[-1]


def fitted_order(epsilons: Sequence[float], errors: Sequence[float]) -> float:
    """Fit a straight line through the logarithms by least squares; returns its slope."""
    x = torch.tensor(epsilons, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) @ y) / (x - x.mean()).square().sum())
