"""The heat limit: closed forms for Gaussians, the order of the error, particles against the heat equation."""

import pytest
import torch

from sinkformer_pl.flows import (
    Mixture,
    ParticleAttention,
    fitted_order,
    follow_heat,
    gaussian_slope,
    heat_drift,
    heat_error,
    measured_slope,
)


@pytest.mark.parametrize("std", [0.42, 1.0])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize(("kernel", "cost"), [("sinkhorn", "l2"), ("sinkhorn", "dot"), ("softmax", "l2")])
def test_slope_of_a_gaussian_on_a_grid_is_the_closed_form(kernel, cost, std, epsilon):
    assert measured_slope(kernel, cost, std, epsilon) == pytest.approx(
        gaussian_slope(kernel, cost, std, epsilon), abs=1e-8
    )


def test_softmax_of_dot_products_diverges():
    drifts = []
    for epsilon in (0.5, 0.25):
        slope = measured_slope("softmax", "dot", 1.0, epsilon)
        assert slope == pytest.approx(1 / epsilon, abs=1e-8)
        drifts.append(abs(1 - slope) / epsilon)
    assert drifts[1] > 2 * drifts[0]


@pytest.mark.parametrize(("kernel", "limit"), [("sinkhorn", 0.5), ("softmax", 1.0)])
def test_drift_tends_to_its_limit_with_order_one(kernel, limit):
    epsilons = (0.0125, 0.025, 0.05)
    errors = [abs((1 - measured_slope(kernel, "l2", 1.0, epsilon)) / epsilon / limit - 1) for epsilon in epsilons]
    # Sinkhorn: epsilon / (4 s^2), so 0.3% at 0.0125; softmax: epsilon / (s^2 + epsilon).
    assert errors[0] == pytest.approx(0.0125 / 4 if kernel == "sinkhorn" else 0.0125 / 1.0125, rel=0.02)
    assert fitted_order(epsilons, errors) == pytest.approx(1.0, abs=0.05)


def test_mixture_solves_the_heat_equation():
    mixture = Mixture((-1.0, 1.0), 0.4)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    h = 1e-4
    rate = (mixture.after(0.3 + h).density(x) - mixture.after(0.3 - h).density(x)) / (2 * h)
    density = mixture.after(0.3).density
    laplacian = (density(x + 1e-3) - 2 * density(x) + density(x - 1e-3)) / 1e-6
    torch.testing.assert_close(rate, laplacian / 2, rtol=0, atol=1e-5)
    quantiles = mixture.quantiles(100)
    grid = torch.linspace(-6, 6, 200001, dtype=torch.float64)
    mass = mixture.density(grid).cumsum(0) * (grid[1] - grid[0])
    found = mass[torch.searchsorted(grid, quantiles)]
    torch.testing.assert_close(found, (torch.arange(100, dtype=torch.float64) + 0.5) / 100, rtol=0, atol=1e-4)


def test_particles_follow_the_heat_equation_to_order_epsilon():
    start = Mixture((-1.0, 1.0), 0.4)
    epsilons = (0.4, 0.2, 0.1)
    errors = [
        heat_error(follow_heat(start, particles=100, epsilon=epsilon, time=0.3), start.after(0.3))
        for epsilon in epsilons
    ]
    still = heat_error(start.quantiles(100)[:, None], start.after(0.3))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1 * still
    # Around 1 while the particles are dense; the next term of the expansion bends it.
    assert 0.8 < fitted_order(epsilons, errors) < 1.4


def test_with_too_few_particles_a_smaller_epsilon_is_worse():
    start = Mixture((-1.0, 1.0), 0.4)
    errors = {
        (n, epsilon): heat_error(follow_heat(start, particles=n, epsilon=epsilon, time=0.3), start.after(0.3))
        for n in (20, 100)
        for epsilon in (0.05, 0.025)
    }
    assert errors[20, 0.025] > 1.5 * errors[20, 0.05]
    assert errors[100, 0.025] < 0.6 * errors[100, 0.05]


def test_drift_of_sinkhorn_has_no_net_force():
    x = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drift = heat_drift(ParticleAttention.smoothing(2, 0.3), x)
    torch.testing.assert_close(drift.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_there_is_no_slope_without_normalization():
    with pytest.raises(ValueError, match="only softmax and sinkhorn have a slope"):
        gaussian_slope("exponential", "l2", 1.0, 0.1)
