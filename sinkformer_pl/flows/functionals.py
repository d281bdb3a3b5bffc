"""Functionals of the measure that attention descends, their gradients, and a test for whether there is one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sinkformer_pl.flows.attention import ParticleAttention
from sinkformer_pl.flows.potentials import potentials

Functional = Callable[[Tensor], Tensor]
Field = Callable[[Tensor], Tensor]


def interaction_energy(attention: ParticleAttention, x: Tensor) -> Tensor:
    """Compute F^0(mu) = 1/2 ∫∫ exp(c(x, y)) dmu(x) dmu(y) of the uniform measure on the particles.

    Args:
        attention: has the scores; its kernel and value play no part.
        x: (N, D).

    Returns:
        A number.
    """
    return attention.scores(x).exp().mean() / 2


def transport_energy(attention: ParticleAttention, x: Tensor) -> Tensor:
    """Compute F^inf(mu) = -1/2 ∫∫ k log(k / exp(c)) dmu dmu of the uniform measure, k the kernel of Sinkhorn.

    As log(k / exp(c)) = f + g, it is -1/2 ∫ (f + g) dmu. It is the largest value of 1/2 ∫∫ (c k - k log k) dmu dmu
    among all k whose integrals in x and y are 1: minus half the cost of entropic optimal transport from mu to itself.

    Args:
        attention: has the scores; its kernel and value play no part.
        x: (N, D).

    Returns:
        A number, differentiable three times.

    Raises:
        ValueError: Sinkhorn does not converge.
    """
    n = len(x)
    f, g = potentials(attention.scores(x), x.new_full((n,), -math.log(n)))
    return -(f.mean() + g.mean()) / 2


def wasserstein_gradient(functional: Functional, x: Tensor) -> Tensor:
    """Compute the Wasserstein gradient at the uniform measure on the particles: N times that in the particles.

    Args:
        functional: of the particles (N, D), a number.
        x: (N, D).

    Returns:
        (N, D).
    """
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(functional(x), x)
    return len(x) * gradient


def jacobian_asymmetry(field: Field, x: Tensor) -> float:
    """Compute |J - J^T| / |J| in the Frobenius norm, J the N·D x N·D Jacobian of velocities in particles.

    A field on particles of equal mass is a Wasserstein gradient only if this is 0.

    Args:
        field: (N, D) -> (N, D).
        x: (N, D).
    """
    jacobian = torch.autograd.functional.jacobian(field, x, vectorize=True).reshape(x.numel(), x.numel())
    return float((jacobian - jacobian.mT).norm() / jacobian.norm())
