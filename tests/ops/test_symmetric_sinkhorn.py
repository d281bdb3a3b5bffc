"""Symmetric Sinkhorn against Sinkhorn, entropic transport and the rate of its steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkformer_pl.ops import AttentionMask, causal_pairs, marginal_error, sinkhorn, softmax
from sinkformer_pl.ops.symmetric_sinkhorn import symmetric_sinkhorn
from tests.optional import ot

REAL = torch.tensor([[True, True, False, True, True], [False, True, True, False, True]])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(*shape, std=1.0, seed=0):
    """Symmetric scores q·q: positive definite, and so are their exponentials."""
    q = draw(*shape, 8, seed=seed)
    return std * q @ q.mT / 8**0.5


def symmetric(*shape, seed=0):
    """Symmetric scores that are not of this kind."""
    scores = draw(*shape, shape[-1], seed=seed)
    return (scores + scores.mT) / 2


@pytest.mark.parametrize(
    "scores", [products(2, 3, 12), products(2, 12, std=0.3), symmetric(2, 3, 9)], ids=["products", "flat", "indefinite"]
)
def test_the_limit_is_that_of_sinkhorn(scores):
    weights = symmetric_sinkhorn(scores, 101)
    torch.testing.assert_close(weights, sinkhorn(scores, 5001), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(weights, weights.mT, rtol=0, atol=1e-10)


def test_the_limit_is_the_plan_of_entropic_transport():
    scores = products(10)
    plan = ot.sinkhorn(np.ones(10), np.ones(10), -scores.numpy(), 1.0, method="sinkhorn_log", numItermax=200_000,
                       stopThr=1e-11)  # fmt: skip
    torch.testing.assert_close(symmetric_sinkhorn(scores, 101), torch.from_numpy(plan), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n_iters", [1, 2, 3, 6])
def test_steps_by_hand(n_iters):
    kernel, x = products(7).exp(), torch.ones(7, dtype=torch.float64)
    for _ in range(n_iters - 1):
        x = (x / (kernel @ x)).sqrt()
    wanted = torch.diag(1 / (kernel @ x)) @ kernel @ torch.diag(x)
    torch.testing.assert_close(symmetric_sinkhorn(products(7), n_iters), wanted)


@pytest.mark.parametrize("n_iters", [1, 2, 3, 20])
def test_rows_are_exact_after_any_number_of_steps(n_iters):
    rows = symmetric_sinkhorn(products(2, 3, 33, std=5), n_iters).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-13)


def test_one_step_is_softmax():
    torch.testing.assert_close(symmetric_sinkhorn(products(2, 3, 7), 1), softmax(products(2, 3, 7)))


@pytest.mark.parametrize("n_iters", [3, 5, 11, 21])
@pytest.mark.parametrize("std", [1, 2, 8])
def test_columns_converge_faster_than_those_of_sinkhorn_where_scores_are_sharp(std, n_iters):
    scores = products(16, 1, 64, std=std)
    found, others = (marginal_error(function(scores, n_iters)) for function in (symmetric_sinkhorn, sinkhorn))
    assert found.mean() < 0.5 * others.mean()


@pytest.mark.parametrize("std", [0.1, 1, 3, 10])
def test_each_step_at_least_halves_the_error(std):
    errors = [marginal_error(symmetric_sinkhorn(products(4, 1, 32, std=std), n)) for n in range(4, 16)]
    for earlier, later in pairwise(errors):
        assert (later <= 0.51 * earlier + 1e-13).all()


@pytest.mark.parametrize("std", [0.5, 2])
def test_the_rate_is_that_of_the_docstring(std):
    scores = products(12, std=std)
    others = torch.linalg.eigvalsh(symmetric_sinkhorn(scores, 201))[:-1]
    found, slower = (
        (marginal_error(f(scores, n + 4)) / marginal_error(f(scores, n))) ** 0.25
        for f, n in ((symmetric_sinkhorn, 15), (sinkhorn, 25 if std < 1 else 401))
    )
    assert found.item() == pytest.approx(((1 - others) / 2).abs().max().item(), rel=0.05)
    assert slower.item() == pytest.approx(others.max().item(), rel=0.05)


@st.composite
def padded_scores(draw_value):
    batch, tokens = draw_value(st.integers(1, 3)), draw_value(st.integers(1, 6))
    bools = st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)
    real = torch.tensor(draw_value(bools)).reshape(batch, tokens)
    scores = products(batch, 2, tokens, seed=draw_value(st.integers(0, 99)), std=draw_value(st.sampled_from([1, 10])))
    return scores, AttentionMask(real, real), draw_value(st.sampled_from([1e30, -1e30, 0.0, 7.0]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(padded_scores(), st.sampled_from([1, 2, 5]))
def test_the_real_block_is_what_the_unpadded_scores_give(padded, n_iters):
    scores, mask, filler = padded
    allowed = mask.allowed(scores).expand(scores.shape)
    filled, upstream = scores.where(allowed, filler).requires_grad_(), draw(*scores.shape, seed=5)
    weights = symmetric_sinkhorn(filled, n_iters, mask=mask)
    (gradient,) = torch.autograd.grad(weights, filled, upstream)
    assert (weights[~allowed] == 0).all()
    assert (gradient[~allowed] == 0).all()
    for i, real in enumerate(mask.query):
        block = scores[i][:, real][:, :, real].requires_grad_()
        if not real.any():
            continue
        wanted = symmetric_sinkhorn(block, n_iters)
        torch.testing.assert_close(weights[i][:, real][:, :, real], wanted, rtol=0, atol=1e-12)
        (wanted,) = torch.autograd.grad(wanted, block, upstream[i][:, real][:, :, real])
        torch.testing.assert_close(gradient[i][:, real][:, :, real], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_iters", [1, 2, 4])
def test_gradcheck(n_iters, masked):
    scores, mask = products(2, 2, 5).requires_grad_(), AttentionMask(REAL, REAL) if masked else None
    assert torch.autograd.gradcheck(lambda s: symmetric_sinkhorn(s, n_iters, mask=mask), scores, atol=1e-8, rtol=1e-6)


def test_permuting_tokens_permutes_the_weights():
    scores, order = products(2, 2, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    moved = symmetric_sinkhorn(scores[..., order, :][..., order], 4)
    torch.testing.assert_close(moved, symmetric_sinkhorn(scores, 4)[..., order, :][..., order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_and_range(dtype):
    scores = products(2, 2, 32, std=3).to(dtype)
    weights, wanted = symmetric_sinkhorn(scores, 5), symmetric_sinkhorn(scores.double(), 5)
    tolerance = {torch.float64: 1e-15, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert weights.dtype == dtype
    assert (weights.double() - wanted).norm() <= tolerance * wanted.norm()
    large = products(2, 2, 32, std=1e3 if dtype == torch.float16 else 1e4).to(dtype).requires_grad_()
    symmetric_sinkhorn(large, 5).square().sum().backward()
    assert large.grad is not None
    assert large.grad.isfinite().all()


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        weights = symmetric_sinkhorn(products(2, 2, 8).float(), 4)
    torch.testing.assert_close(weights, symmetric_sinkhorn(products(2, 2, 8).float(), 4), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 4, 3)])
def test_scores_that_arent_square_are_refused(shape):
    with pytest.raises(ValueError, match=r"need the shape \(\.\.\., N, N\)"):
        symmetric_sinkhorn(draw(*shape))


@pytest.mark.parametrize("mask", [AttentionMask(REAL), AttentionMask(key=REAL), AttentionMask(REAL, REAL.clone())])
def test_queries_and_keys_of_two_masks_are_refused(mask):
    with pytest.raises(ValueError, match="one mask"):
        symmetric_sinkhorn(products(2, 1, 5), mask=mask)


def test_pairs_and_wrong_numbers_of_steps_are_refused():
    with pytest.raises(NotImplementedError, match="forbidden pairs"):
        symmetric_sinkhorn(products(2, 1, 5), mask=AttentionMask(pairs=causal_pairs(5, 5)))
    for n_iters in (0, -1, True, 2.0, "3", None):
        with pytest.raises(ValueError, match="n_iters must be an integer of at least 1"):
            symmetric_sinkhorn(products(5), n_iters)
