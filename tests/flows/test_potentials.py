"""Potentials at convergence, against the half-steps of ops, and their derivatives."""

import pytest
import torch

from sinkformer_pl.flows import ParticleAttention, integrate, jacobian_asymmetry, potentials, transport_energy
from sinkformer_pl.ops import sinkhorn


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("std", [0.5, 3.0])
def test_weights_are_the_limit_of_the_half_steps(std):
    """Of scores that are not symmetric, too."""
    x, query, key = draw(15, 3), std * draw(4, 3, seed=1), draw(4, 3, seed=2)
    attention = ParticleAttention(query, key, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(
        attention.weights(x), sinkhorn(attention.scores(x), 50_001 if std > 1 else 2001), rtol=0, atol=1e-11
    )


def test_far_scores_neither_overflow_nor_underflow():
    x = torch.tensor([[0.0], [1.0], [300.0]], dtype=torch.float64)
    weights = ParticleAttention.smoothing(1, 1.0).weights(x)
    assert weights[2, 2] == 1
    assert weights[0, 2] == 0
    torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))


def test_first_and_second_derivatives_hold_through_the_potentials():
    def energy(entries):
        attention = ParticleAttention(entries.reshape(2, 2), torch.eye(2, dtype=torch.float64), value)
        return transport_energy(attention, x)

    x, value = 0.7 * draw(6, 2), torch.eye(2, dtype=torch.float64)
    entries = draw(4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(energy, (entries,), atol=1e-7)
    assert torch.autograd.gradgradcheck(energy, (entries,), atol=1e-6)


def test_velocity_is_differentiated_through_the_potentials():
    """The Jacobian of the table is that of the whole field, not of one with the potentials held."""
    attention, x = ParticleAttention.smoothing(2, 1.0, cost="dot"), 0.7 * draw(6, 2)
    jacobian = torch.autograd.functional.jacobian(attention, x).reshape(12, 12)
    step = 1e-6 * torch.eye(12, dtype=torch.float64).reshape(12, 6, 2)
    numeric = torch.stack([((attention(x + h) - attention(x - h)) / 2e-6).flatten() for h in step], 1)
    torch.testing.assert_close(jacobian, numeric, rtol=0, atol=1e-7)
    assert jacobian_asymmetry(attention, x) < 1e-12


def test_scores_too_sharp_are_refused():
    # Near the triangle, which only the identity's potentials at infinity would make doubly stochastic.
    scores = torch.tensor([[0.0, 0.0], [-2000.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"did not converge.*too sharp; take a larger epsilon"):
        potentials(scores, torch.full((2,), 0.5, dtype=torch.float64).log())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time": 1.0, "steps": 0}, "steps must be at least 1"),
        ({"time": -1.0, "steps": 2}, "time at least 0"),
        ({"time": 1.0, "steps": 2, "integrator": "heun"}, "integrator must be one of euler, rk4"),
        ({"time": 1e200, "steps": 2}, "no finite numbers after step 1 of 2"),
    ],
)
def test_integrate_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        integrate(lambda x: x**3, torch.ones(2, 1, dtype=torch.float64) * 1e10, **arguments)


def test_a_row_that_vanishes_beside_others_comes_back():
    """After the first step the largest entry of the second row is exp(-1000)."""
    scores = torch.tensor([[2000.0, 0.0], [0.0, -2000.0]], dtype=torch.float64)
    f, g = potentials(scores, torch.full((2,), 0.5, dtype=torch.float64).log())
    plan = (scores + f + g).exp() / 2
    torch.testing.assert_close(plan, torch.full_like(plan, 0.5), rtol=0, atol=1e-10)
