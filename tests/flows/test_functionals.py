"""Which attentions are gradient flows, and of what: automatic derivatives, finite differences, Jacobians."""

import math
from functools import partial

import pytest
import torch

from sinkformer_pl.flows import (
    ParticleAttention,
    heat_drift,
    integrate,
    interaction_energy,
    jacobian_asymmetry,
    potentials,
    transport_energy,
    wasserstein_gradient,
)

ENERGIES = {"exponential": interaction_energy, "sinkhorn": transport_energy}


def particles(n=12, d=3, std=0.7, seed=0):
    return std * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def descent(kernel, d=3, epsilon=1.0):
    """W_Q^T W_K symmetric, of both signs, and W_V = -W_Q^T W_K."""
    generator = torch.Generator().manual_seed(1)
    product = torch.randn(d, d, dtype=torch.float64, generator=generator)
    return ParticleAttention.descent(torch.eye(d, dtype=torch.float64), (product + product.mT) / 2, kernel, epsilon)


@pytest.mark.parametrize("epsilon", [1.0, 0.5])
@pytest.mark.parametrize("kernel", ["exponential", "sinkhorn"])
def test_velocity_is_minus_the_gradient_of_its_functional(kernel, epsilon):
    attention, x = descent(kernel, epsilon=epsilon), particles()
    energy = partial(ENERGIES[kernel], attention)
    velocity = attention(x)
    gradient = wasserstein_gradient(energy, x)
    assert (velocity + gradient).norm() < 1e-10 * velocity.norm()
    # And by differences of values alone.
    step, numeric = 1e-5, torch.empty_like(x)
    for place in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[place] = step
        shift = shift.view_as(x)
        numeric.view(-1)[place] = len(x) * (energy(x + shift) - energy(x - shift)) / (2 * step)
    assert (velocity + numeric).abs().max() < 1e-6


def test_softmax_is_the_gradient_of_neither():
    attention, x = descent("softmax"), particles()
    for energy in ENERGIES.values():
        gradient = wasserstein_gradient(partial(energy, attention), x)
        assert (attention(x) + gradient).norm() > 0.1 * gradient.norm()


@pytest.mark.parametrize(("kernel", "symmetric"), [("exponential", True), ("sinkhorn", True), ("softmax", False)])
def test_jacobian_is_symmetric_but_for_softmax(kernel, symmetric):
    asymmetry = jacobian_asymmetry(descent(kernel), particles())
    assert asymmetry <= 1e-6 if symmetric else asymmetry > 1e-2


def test_with_another_value_matrix_sinkhorn_is_no_gradient_either():
    attention = descent("sinkhorn")
    value = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    turned = ParticleAttention(attention.query, attention.key, value)
    assert jacobian_asymmetry(turned, particles()) > 1e-2


@pytest.mark.parametrize("kernel", ["exponential", "sinkhorn"])
def test_own_functional_falls_along_the_flow(kernel):
    attention = descent(kernel)
    path = integrate(attention, particles(), time=0.5, steps=25)
    values = torch.stack([ENERGIES[kernel](attention, x) for x in path])
    assert (values.diff() < 0).all()


def test_mean_of_sinkhorn_obeys_its_own_law():
    x, attention = particles(), descent("sinkhorn")
    velocity = attention(x).mean(0)
    torch.testing.assert_close(velocity, attention.value @ x.mean(0), rtol=1e-9, atol=1e-12)
    assert (descent("softmax")(x).mean(0) - velocity).norm() > 1e-2


def test_heat_drift_is_a_gradient_flow():
    """With the l2 cost, too: d F^inf / dx is then (x - mean of y) / epsilon."""
    attention, x = ParticleAttention.smoothing(3, 0.5), particles()
    gradient = wasserstein_gradient(partial(transport_energy, attention), x)
    torch.testing.assert_close(heat_drift(attention, x), -gradient, rtol=1e-9, atol=1e-11)


def test_potentials_make_both_marginals_right_and_transport_energy_is_a_maximum():
    x = particles()
    scores = ParticleAttention.smoothing(3, 0.3, cost="dot").scores(x)
    log_mass = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(0)
    f, g = potentials(scores, log_mass)
    plan = (scores + f + g + log_mass + log_mass[:, None]).exp()
    torch.testing.assert_close(plan.sum(0), log_mass.exp(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(plan.sum(1), log_mass.exp(), rtol=1e-12, atol=1e-14)
    # Against another library's cost of the same plan.
    import ot

    n = len(x)
    attention = ParticleAttention.smoothing(3, 0.3, cost="l2")
    cost = -attention.scores(x).numpy()
    uniform = [1 / n] * n
    plan = torch.from_numpy(ot.sinkhorn(uniform, uniform, cost, 1.0, "sinkhorn_log", 10000, stopThr=1e-13))
    value = 0.5 * (plan * (-torch.from_numpy(cost) - (plan * n * n).log())).sum()
    assert float(transport_energy(attention, x)) == pytest.approx(float(value), rel=1e-8)


@pytest.mark.parametrize("kernel", ["exponential", "softmax", "sinkhorn"])
def test_weights_are_what_they_are_called(kernel):
    x = particles()
    attention = descent(kernel)
    weights = attention.weights(x)
    rows, columns = weights.sum(1), weights.sum(0)
    if kernel == "exponential":
        torch.testing.assert_close(weights, attention.scores(x).exp() / len(x))
    else:
        torch.testing.assert_close(rows, torch.ones_like(rows))
    assert ((columns - 1).abs().max() < 1e-10) == (kernel == "sinkhorn")
    if kernel == "softmax":
        torch.testing.assert_close(weights, attention.scores(x).softmax(1))


@pytest.mark.parametrize(("integrator", "order"), [("euler", 1), ("rk4", 4)])
def test_integrators_have_their_order(integrator, order):
    def field(x):
        return torch.stack([x[:, 1], -x[:, 0]], 1)

    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    exact = torch.tensor([[math.cos(1.0), -math.sin(1.0)]], dtype=torch.float64)
    errors = [
        float((integrate(field, start, time=1.0, steps=steps, integrator=integrator)[-1] - exact).norm())
        for steps in (20, 40)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda one: ParticleAttention(one, one, one, kernel="linear"), "kernel must be one of exponential"),
        (lambda one: ParticleAttention(one, one, one, cost="l1"), "cost must be one of dot, l2"),
        (lambda one: ParticleAttention(one, one, one, epsilon=0.0), "epsilon must be positive"),
        (lambda one: ParticleAttention(one, one[:2], one), "query and key must be matrices of one shape"),
        (lambda one: ParticleAttention(one, one, one[:2, :2]), "value must be 3 x 3"),
        (lambda one: ParticleAttention.descent(one, one.roll(1, 0)), "must be symmetric"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.eye(3, dtype=torch.float64))
