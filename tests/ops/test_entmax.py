"""Sparsemax and alpha-entmax against the `entmax` package, the conditions of the optimum, and their limits."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkformer_pl.ops import AttentionMask, causal_pairs
from sinkformer_pl.ops.entmax import entmax, entmax15, sparsemax
from tests.optional import entmax as library

FAMILY = {
    "sparsemax": (sparsemax, 2.0),
    "entmax15": (entmax15, 1.5),
    **{f"entmax {alpha:g}": (partial(entmax, alpha=alpha), alpha) for alpha in (1.0, 1.001, 1.3, 1.5, 2.0, 3.0)},
}
each = pytest.mark.parametrize(("function", "alpha"), FAMILY.values(), ids=FAMILY)
close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-7)


def draw(*shape, std=1.0, seed=0):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(output, *leaves):
    return torch.autograd.grad(output, leaves, draw(*output.shape, seed=1).to(output.dtype))


@pytest.mark.parametrize("std", [0.1, 1, 10])
@pytest.mark.parametrize(
    ("function", "oracle"),
    [(sparsemax, library.sparsemax), (entmax15, library.entmax15)]
    + [(partial(entmax, alpha=a), partial(library.entmax_bisect, alpha=a, n_iter=60)) for a in (1.01, 1.3, 1.9, 3.0)],
)
def test_agrees_with_the_entmax_package(function, oracle, std):
    scores = draw(2, 3, 5, 40, std=std).requires_grad_()
    found, wanted = function(scores), oracle(scores)
    close(found, wanted)
    close(gradient(found, scores), gradient(wanted, scores))


def test_alpha_of_each_head_agrees_with_the_entmax_package():
    scores, alpha = draw(2, 3, 5, 12).requires_grad_(), torch.tensor([1.05, 1.5, 1.9], dtype=torch.float64)
    alpha.requires_grad_()
    found = entmax(scores, alpha)
    wanted = library.entmax_bisect(scores, alpha[:, None, None].expand(2, 3, 5, 1), n_iter=60)
    close(found, wanted)
    close(gradient(found, scores, alpha), gradient(wanted, scores, alpha))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("exact", "alpha"), [(sparsemax, 2.0), (entmax15, 1.5)])
@pytest.mark.parametrize("kind", ["std 0.01", "std 1", "std 30", "one of many"])
def test_sorting_and_bisection_agree(kind, exact, alpha, dtype, tolerance):
    scores = draw(1, 1, 8, 4096, std=float(kind[4:]) if kind.startswith("std") else 1e-3)
    if kind == "one of many":  # half of the mass on one key, the rest spread over all others
        scores[..., 0] += 2 ** (1 - alpha) / (alpha - 1)
    found, wanted = exact(scores.to(dtype)), entmax(scores.to(dtype).double(), alpha)
    assert float((found - wanted).norm() / wanted.norm()) < tolerance * (10 if kind == "one of many" else 1)
    different = (found > 0) != (wanted > 0)
    assert (torch.maximum(found, wanted)[different] < 1e-6).all()
    assert different.double().mean() < 1e-2


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20), st.floats(1.05, 3))
def test_the_optimum_is_reached(row, alpha):
    """At the optimum x - p^(alpha - 1) / (alpha - 1) is one number where p > 0, and x is below that elsewhere."""
    x = torch.tensor([row], dtype=torch.float64)
    for function, a in ((sparsemax, 2.0), (entmax15, 1.5), (partial(entmax, alpha=alpha), alpha)):
        p = function(x)
        close(p.sum(-1), torch.ones(1, dtype=torch.float64), rtol=1e-12, atol=0)
        threshold = (x - p ** (a - 1) / (a - 1))[:, x.argmax()]
        close(p, ((a - 1) * (x - threshold)).relu() ** (1 / (a - 1)), rtol=1e-6, atol=1e-5 if a > 2 else 1e-9)
        assert (p.diff(dim=-1)[x.diff(dim=-1) > 0] >= 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_at_alpha_1_it_is_softmax(masked):
    mask = AttentionMask(pairs=causal_pairs(6, 6)) if masked else None
    scores = draw(2, 3, 6, 6, std=3).requires_grad_()
    allowed = (mask or AttentionMask()).allowed(scores)
    found, wanted = entmax(scores, 1.0, mask=mask), scores.where(allowed, float("-inf")).softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(found, scores), gradient(wanted, scores), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_derivative_in_alpha_is_sound_down_to_1(dtype):
    scores, found = draw(1, 3, 4, 9), {}
    for near in (0.0, 1e-9, 1e-6, 1e-3):
        alpha = torch.full((3,), 1 + near, dtype=dtype, requires_grad=True)
        found[near] = gradient(entmax(scores.to(dtype), alpha), alpha)[0]
    log_p = scores.log_softmax(-1)
    second = (log_p.exp() * log_p.square()) / 2
    wanted = second.sum(-1, keepdim=True) * log_p.exp() - second  # of the limit, by hand
    wanted = (wanted * draw(*scores.shape, seed=1)).sum((0, 2, 3)).to(dtype)
    for near, value in found.items():
        torch.testing.assert_close(value, wanted, rtol=0, atol=5 * near + 2e-6)


def test_gradcheck():
    mask = AttentionMask(key=torch.tensor([[True, True, False, True, True], [False] * 5]))
    scores = draw(2, 3, 4, 5).requires_grad_()
    alpha = torch.tensor([1.0 + 1e-4, 1.4, 1.97], dtype=torch.float64, requires_grad=True)
    check = partial(torch.autograd.gradcheck, atol=1e-8, rtol=1e-6)
    assert check(lambda x, a: entmax(x, a, mask=mask), (scores, alpha))
    assert check(lambda x, a: entmax(x, a, mask=mask), (scores, alpha[1].detach().requires_grad_()))
    assert check(partial(sparsemax, mask=mask), (scores,))
    assert check(partial(entmax15, mask=mask), (scores,))


def test_second_derivatives():
    scores, alpha = draw(1, 2, 2, 4).requires_grad_(), torch.tensor([1.2, 1.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(entmax, (scores, alpha))
    assert torch.autograd.gradgradcheck(entmax15, (scores,))


@each
@pytest.mark.parametrize("filler", [0.0, 1e30, -1e30])
def test_masked_keys_are_as_if_absent(function, alpha, filler):
    scores, real = draw(2, 3, 5, 7), torch.tensor([False, True, True, False, True, True, False])
    mask = AttentionMask(key=real.expand(2, -1))
    filled, kept = scores.where(real, filler).requires_grad_(), scores[..., real].requires_grad_()
    found, wanted = function(filled, mask=mask), function(kept)
    torch.testing.assert_close(found[..., real], wanted, rtol=1e-12, atol=1e-14)
    assert not found[..., ~real].any()
    upstream = draw(*found.shape, seed=1)
    found_gradient = torch.autograd.grad(found, filled, upstream)[0]
    wanted_gradient = torch.autograd.grad(wanted, kept, upstream[..., real])[0]
    torch.testing.assert_close(found_gradient[..., real], wanted_gradient, rtol=1e-10, atol=1e-12)
    assert not found_gradient[..., ~real].any()


@each
def test_causal_rows_are_those_of_their_prefix(function, alpha):
    scores = draw(1, 2, 6, 6)
    found = function(scores, mask=AttentionMask(pairs=causal_pairs(6, 6)))
    for row in range(6):
        prefix = scores[..., row : row + 1, : row + 1]
        torch.testing.assert_close(found[..., row : row + 1, : row + 1], function(prefix), rtol=1e-12, atol=1e-14)
    assert not found.triu(1).any()


@each
def test_rows_without_a_key_and_with_one(function, alpha):
    pairs = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    pairs[..., 0, :] = False
    pairs[..., 1, 1:] = False
    scores = draw(2, 2, 3, 4).float().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        weights = function(scores, mask=AttentionMask(pairs=pairs))
        found = gradient(weights, scores)[0]
    assert not weights[..., 0, :].any()
    assert weights[..., 1, :].equal(torch.tensor([1.0, 0, 0, 0]).expand(2, 2, 4))
    assert not found[..., :2, :].any()
    assert found[..., 2, :].any()


def test_no_key_at_all():
    scores = draw(2, 3, 4, 0).requires_grad_()
    for function, _ in FAMILY.values():
        assert function(scores).shape == (2, 3, 4, 0)
        function(scores).sum().backward()


def test_sparser_with_alpha():
    scores = draw(1, 1, 50, 60, std=1.5)
    sizes = [float((entmax(scores, alpha) > 0).sum(-1).double().mean()) for alpha in (1.0, 1.2, 1.5, 1.8, 2.0, 3.0)]
    assert sizes[0] == 60
    assert all(more > fewer for more, fewer in pairwise(sizes))


@each
def test_temperature_limits(function, alpha):
    scores = draw(1, 2, 8, 30)
    one_hot = torch.nn.functional.one_hot(scores.argmax(-1), 30).double()
    torch.testing.assert_close(function(scores * 1e6), one_hot, rtol=0, atol=0)
    torch.testing.assert_close(function(scores * 1e-9), torch.full_like(scores, 1 / 30), rtol=1e-5, atol=0)
    shifted = function(scores + 5.0)
    torch.testing.assert_close(shifted, function(scores), rtol=1e-9, atol=1e-7 if alpha > 2 else 1e-12)


@each
def test_large_scores_stay_finite(function, alpha):
    scores = draw(1, 2, 8, 50, std=1e4).float().requires_grad_()
    weights = function(scores)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 8))
    assert gradient(weights, scores)[0].isfinite().all()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, function, alpha):
    scores = draw(2, 2, 5, 700, std=2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        weights = function(scores)
    assert weights.dtype == dtype
    wanted = function(scores.double()).to(dtype)
    torch.testing.assert_close(weights, wanted, rtol=torch.finfo(dtype).eps, atol=1e-3 if alpha > 2 else 1e-7)


def test_alpha_may_be_of_another_dtype():
    scores, alpha = draw(2, 3, 4, 5), torch.tensor([1.25, 1.5, 1.75], requires_grad=True)
    weights = entmax(scores, alpha)
    assert weights.dtype == torch.float64
    close(weights[:, 1], entmax15(scores)[:, 1])
    assert gradient(weights, alpha)[0].dtype == torch.float32


def test_scores_of_two_axes_are_one_sample():
    scores = draw(4, 5)
    close(entmax(scores, torch.tensor(1.5), mask=AttentionMask(key=torch.ones(1, 5) > 0)), entmax15(scores))


@pytest.mark.parametrize("alpha", [0.99, 0, -1.0, float("nan"), float("inf"), torch.tensor([1.5, 0.5, 1.5])])
def test_alpha_out_of_range_is_refused(alpha: Any):
    with pytest.raises(ValueError, match="alpha must be finite and at least 1"):
        entmax(draw(2, 3, 4, 5), alpha)


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1), (3, 1, 1)])
def test_alpha_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"alpha must be a number or a tensor \(\) or \(H,\)"):
        entmax(draw(2, 3, 4, 5), torch.full(shape, 1.5))
    with pytest.raises(ValueError, match=r"alpha must be a number"):
        entmax(draw(4, 5), torch.full(shape, 1.5))
