"""GumbelSinkhorn: its noise, its seed, and the permutation that it approaches."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment

from sinkformer_pl import ops
from sinkformer_pl.normalizations import Sinkhorn
from sinkformer_pl.normalizations.gumbel_sinkhorn import GumbelSinkhorn, gumbel_noise
from sinkformer_pl.ops import AttentionMask, causal_pairs

MASK = AttentionMask(torch.arange(5).expand(2, -1) < 4, torch.arange(6).expand(2, -1) > 1)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4), (2, 3, 5, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def seeded(function, *given, seed=3, **named):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return function(*given, **named)


def test_the_noise_is_standard_gumbel():
    noise = seeded(gumbel_noise, (200_000,), torch.zeros((), dtype=torch.float64))
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 0.01
    assert noise.mean().item() == pytest.approx(stats.gumbel_r.mean(), abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_the_noise_is_finite_whatever_is_drawn(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)
    for dtype in (torch.float32, torch.float64):
        assert gumbel_noise((3,), torch.zeros((), dtype=dtype)).isfinite().all()


def test_weights_take_independent_gumbel_noise_at_each_pair():
    """After one row step the logarithms of two weights differ by the scores and two draws: a logistic variable."""
    q, k, *_ = (x.repeat(500, 1, 1, 1) for x in inputs())
    module = GumbelSinkhorn(n_iters=1, noise_temperature=0.5)
    log_weights = seeded(module.weights, q, k, None, scale=0.3).log() * 0.5
    noise = log_weights - 0.3 * q @ k.mT
    differences = (noise[..., ::2] - noise[..., 1::2]).flatten()
    assert stats.kstest(differences.numpy(), stats.logistic.cdf).pvalue > 0.01
    assert abs(torch.corrcoef((noise[..., 0] - noise[..., 1]).flatten(0, 1).T).fill_diagonal_(0)).max() < 0.1


@pytest.mark.parametrize("scale", [0.5, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)], ids=["number", "per head"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_evaluation_is_sinkhorn_at_the_temperature(mask, scale):
    q, k, v, bias = inputs()
    module = GumbelSinkhorn(5, noise_temperature=0.4).eval()
    given, wanted = {"scale": scale, "bias": bias}, {"scale": scale / 0.4, "bias": bias / 0.4}
    torch.testing.assert_close(module.attend(q, k, v, mask, **given), Sinkhorn(5).attend(q, k, v, mask, **wanted))
    torch.testing.assert_close(module.weights(q, k, mask, **given), Sinkhorn(5).weights(q, k, mask, **wanted))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_attend_is_weights_times_values_of_one_draw(mask, with_bias):
    q, k, v, bias = inputs()
    module, given = GumbelSinkhorn(5, noise_temperature=0.7), {"scale": 0.5, "bias": bias if with_bias else None}
    weights = seeded(module.weights, q, k, mask, **given)
    torch.testing.assert_close(seeded(module.attend, q, k, v, mask, **given), weights @ v)
    real = (mask or AttentionMask()).query_column(weights)
    torch.testing.assert_close(weights.sum(-1, keepdim=True), real.double().expand(2, 3, 5, 1))


def test_training_draws_anew_at_each_call_from_the_global_seed():
    q, k, v, _ = inputs()
    module = GumbelSinkhorn()
    first, again = (seeded(module.attend, q, k, v, None, scale=0.5) for _ in range(2))
    assert first.equal(again)
    assert not first.equal(seeded(module.attend, q, k, v, None, scale=0.5, seed=4))
    assert not module.attend(q, k, v, None, scale=0.5).equal(module.attend(q, k, v, None, scale=0.5))
    assert not module.weights(q, k, None, scale=0.5).equal(module.weights(q, k, None, scale=0.5))


def test_evaluation_draws_nothing():
    q, k, v, _ = inputs()
    module, state = GumbelSinkhorn().eval(), torch.get_rng_state()
    module.attend(q, k, v, None, scale=0.5)
    module.weights(q, k, None, scale=0.5)
    assert torch.get_rng_state().equal(state)


def test_low_temperature_gives_the_best_assignment_of_the_noisy_scores():
    q, k = (torch.randn(4, 2, 4, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    weights = seeded(GumbelSinkhorn(2001, noise_temperature=0.02).weights, q, k, None, scale=0.3)
    noisy = 0.3 * q @ k.mT + seeded(gumbel_noise, (4, 2, 4, 4), q)
    for plan, scores in zip(weights.flatten(0, 1), noisy.flatten(0, 1), strict=True):
        wanted = torch.zeros(4, 4, dtype=torch.float64)
        wanted[linear_sum_assignment(scores.numpy(), maximize=True)] = 1
        torch.testing.assert_close(plan, wanted, rtol=0, atol=0.05)


def test_a_lower_temperature_is_nearer_to_a_permutation():
    q, k = (torch.randn(8, 2, 6, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    largest = [
        seeded(GumbelSinkhorn(501, noise_temperature=t).weights, q, k, None, scale=0.3).amax(-1).mean()
        for t in (2.0, 1.0, 0.3, 0.1)
    ]
    assert largest == sorted(largest)
    assert largest[-1] > 0.9


def test_the_gradient_is_that_of_the_noisy_scores():
    q, k, v, bias = (x.requires_grad_() for x in inputs())
    module = GumbelSinkhorn(3, noise_temperature=0.8)

    def attend(q, k, v, bias):
        return seeded(module.attend, q, k, v, MASK, scale=0.5, bias=bias)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias), atol=1e-8, fast_mode=True)


def test_scale_and_bias_of_half_precision_are_divided_in_single_precision():
    q, k, v, bias = inputs(torch.bfloat16)
    scale, module = torch.tensor([0.3, 0.7, 1.1]).bfloat16(), GumbelSinkhorn(3, noise_temperature=0.3).eval()
    for found, wanted in (
        ({"scale": scale}, {"scale": scale.float()}),
        ({"scale": 0.5, "bias": bias}, {"scale": 0.5, "bias": bias.float()}),
    ):
        assert module.attend(q, k, v, None, **found).equal(module.attend(q, k, v, None, **wanted))


def test_training_compiles_to_one_graph():
    q, k, v, _ = inputs(torch.float32)
    torch.compiler.reset()
    module = GumbelSinkhorn()
    attend = torch.compile(lambda q, k, v: module.attend(q, k, v, None, scale=0.5), fullgraph=True, backend="eager")
    torch.testing.assert_close(seeded(attend, q, k, v), seeded(module.attend, q, k, v, None, scale=0.5))


def test_defaults_reach_unit_columns_in_spite_of_the_noise():
    scores = torch.randn(16, 1, 65, 65, generator=torch.Generator().manual_seed(0))
    errors = [ops.marginal_error(seeded(GumbelSinkhorn(n), scores, AttentionMask())).mean() for n in (3, 21)]
    assert GumbelSinkhorn().n_iters == 21
    assert errors[0] > 0.3
    assert errors[1] < 0.03


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.inf, math.nan, True, "1", None])
def test_temperatures_that_arent_positive_are_refused(temperature: Any):
    with pytest.raises(ValueError, match="noise_temperature must be a positive number, got"):
        GumbelSinkhorn(noise_temperature=temperature)


def test_even_half_steps_and_pairs_are_refused():
    with pytest.raises(ValueError, match=r"GumbelSinkhorn: n_iters .* use an odd number"):
        GumbelSinkhorn(20)
    q, k, v, _ = inputs()
    with pytest.raises(NotImplementedError, match="pairs"):
        GumbelSinkhorn().attend(q, k, v, AttentionMask(pairs=causal_pairs(5, 6)), scale=1.0)
    assert not GumbelSinkhorn(1).promises.unit_columns
