"""Sinkhorn's weights against independent computations, laws and limits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkformer_pl.ops import AttentionMask, marginal_error, sinkhorn, softmax
from tests.optional import geomloss_ot, ot

SINGLE_AND_DOUBLE = (torch.float64, torch.float32)
OUTPUT = {
    torch.float64: {1: 1e-13, 10: 1e-12, 50: 1e-11},
    torch.float32: {1: 2e-6, 10: 5e-6, 50: 1e-5},
    torch.bfloat16: dict.fromkeys((1, 10, 50), 4e-3),
    torch.float16: dict.fromkeys((1, 10, 50), 5e-4),
}
GRADIENT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(scores, n_iters):
    """Normalize the matrix itself, row after row and column after column, in float64."""
    queries, keys = scores.shape[-2:]
    log_plan = scores.double()
    for step in range(n_iters):
        axis = -1 if step % 2 == 0 else -2
        top = log_plan.detach().amax(axis, keepdim=True)
        log_sum = (log_plan - top).exp().sum(axis, keepdim=True).log() + top
        log_plan = log_plan - log_sum + (0 if axis == -1 else np.log(queries / keys))
    return log_plan.exp()


def relative(got, want, norm=None):
    return float((got.double() - want).detach().norm() / (want if norm is None else norm).detach().norm())


@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
@pytest.mark.parametrize("std", [1, 10, 50])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (17, 17), (64, 64), (512, 512), (3, 17), (64, 5)], ids=str)
@pytest.mark.parametrize("n_iters", [1, 3, 5, 21])
def test_weights_and_gradients_against_the_naive_loop(shape, n_iters, std, dtype):
    scores = (draw(2, 1, *shape) * std).to(dtype).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    upstream = draw(2, 1, *shape, seed=1, dtype=dtype)
    weights, wanted = sinkhorn(scores, n_iters), naive(exact, n_iters)
    assert weights.dtype == dtype
    assert relative(weights, wanted) <= OUTPUT[dtype][std]
    (gradient,) = torch.autograd.grad(weights, scores, upstream)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, upstream.double())
    # Some gradients cancel to nearly 0, so the error is taken over the terms that cancel.
    assert relative(gradient, wanted_gradient, (wanted * upstream).detach()) <= GRADIENT[dtype]


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 7)])
def test_the_limit_is_the_plan_of_entropic_transport(shape):
    scores = draw(*shape)
    queries, keys = shape
    plan = ot.sinkhorn(np.ones(queries), np.full(keys, queries / keys), -scores.numpy(), 1.0, method="sinkhorn_log",
                       numItermax=20000, stopThr=1e-13)  # fmt: skip
    assert relative(sinkhorn(scores, 501), torch.from_numpy(plan)) <= 1e-6


@pytest.mark.parametrize("shape", [(12, 12), (9, 14)])
def test_the_limit_is_the_plan_of_geomloss(shape):
    """To what its own iterations have come to."""
    scores = draw(*shape)
    row, column = (torch.full((size,), 1 / size, dtype=torch.float64) for size in shape)
    plan = geomloss_ot.solve(-scores, reg=1.0, a=row, b=column, max_iter=1000).plan * shape[0]
    assert relative(sinkhorn(scores, 501), plan) <= 1e-3


@pytest.mark.parametrize("shape", [(9, 9), (6, 11)])
def test_the_limit_with_given_marginals_is_the_plan_of_entropic_transport(shape):
    scores = draw(*shape)
    row, column = (draw(size, seed=size).abs() + 0.1 for size in (shape[0], shape[1] + 20))
    column = column[: shape[1]]
    row, column = row / row.sum(), column / column.sum()
    plan = ot.sinkhorn(row.numpy(), column.numpy(), -scores.numpy(), 1.0, method="sinkhorn_log", numItermax=20000,
                       stopThr=1e-13)  # fmt: skip
    weights = sinkhorn(scores, 1001, row_marginal=row, column_marginal=column)
    assert relative(weights, torch.from_numpy(plan)) <= 1e-6
    torch.testing.assert_close(weights.sum(-1), row, rtol=1e-12, atol=0)


def test_the_limit_under_a_mask_is_the_plan_of_the_real_block():
    scores, real = draw(1, 1, 8, 9), AttentionMask(torch.arange(8)[None] < 6, torch.arange(9)[None] >= 2)
    plan = ot.sinkhorn(np.ones(6), np.full(7, 6 / 7), -scores[0, 0, :6, 2:].numpy(), 1.0, method="sinkhorn_log",
                       numItermax=20000, stopThr=1e-13)  # fmt: skip
    assert relative(sinkhorn(scores, 501, mask=real)[0, 0, :6, 2:], torch.from_numpy(plan)) <= 1e-6


@pytest.mark.parametrize("std", [1, 10, 50])
def test_one_half_step_is_softmax(std):
    scores = draw(2, 2, 33, 17, dtype=torch.float32) * std
    torch.testing.assert_close(sinkhorn(scores, 1), scores.softmax(-1), rtol=0, atol=2e-7)
    scores = scores.double()
    torch.testing.assert_close(sinkhorn(scores, 1), scores.softmax(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("std", [1, 10, 50])
def test_odd_counts_end_on_rows_and_even_counts_on_columns(dtype, tolerance, std):
    scores = draw(2, 2, 64, 48, dtype=dtype) * std
    for n_iters in (1, 3, 5, 21):
        rows = sinkhorn(scores, n_iters).sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=tolerance)
    # Columns aren't made by the last operation, so that they are as exact as the scores.
    tolerance = tolerance * (1 if dtype == torch.float32 else std)
    columns = sinkhorn(scores, 4).sum(-2)
    torch.testing.assert_close(columns, torch.full_like(columns, 64 / 48), rtol=0, atol=tolerance * 64 / 48)


def test_the_order_is_rows_first():
    scores = draw(5, 7)
    columns_of_softmax = scores.softmax(-1) / scores.softmax(-1).sum(-2, keepdim=True) * 5 / 7
    torch.testing.assert_close(sinkhorn(scores, 2), columns_of_softmax)


@st.composite
def padded_scores(draw_value):
    batch, queries, keys = (draw_value(st.integers(1, high)) for high in (3, 6, 6))
    bools = st.lists(st.booleans(), min_size=batch * (queries + keys), max_size=batch * (queries + keys))
    flat = torch.tensor(draw_value(bools)).reshape(batch, queries + keys)
    filler = draw_value(st.one_of(st.floats(-1e30, 1e30), st.sampled_from([1e30, -1e30, -1e9, 0.0])))
    scores = draw(batch, 2, queries, keys, seed=draw_value(st.integers(0, 99))) * draw_value(st.sampled_from([1, 10]))
    return scores, AttentionMask(flat[:, :queries], flat[:, queries:]), filler


@settings(max_examples=60, deadline=None, derandomize=True)
@given(padded_scores(), st.sampled_from([1, 2, 3, 6]), st.sampled_from(SINGLE_AND_DOUBLE), st.sampled_from([0.5, 1.0]))
def test_the_real_block_is_what_the_unpadded_scores_give(padded, n_iters, dtype, lam):
    scores, mask, filler = padded
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-6}
    allowed = mask.allowed(scores).expand(scores.shape)
    filled = scores.to(dtype).where(allowed, filler).requires_grad_()
    upstream = draw(*scores.shape, seed=5, dtype=dtype)
    weights = sinkhorn(filled, n_iters, mask=mask, lam=lam)
    (gradient,) = torch.autograd.grad(weights, filled, upstream)
    assert (weights[~allowed] == 0).all()
    assert (gradient[~allowed] == 0).all()
    assert mask.query is not None
    assert mask.key is not None
    for i, (rows, columns) in enumerate(zip(mask.query, mask.key, strict=True)):
        alone = scores[i][:, rows][:, :, columns].to(dtype).requires_grad_()
        if alone.numel():
            wanted = sinkhorn(alone, n_iters, lam=lam)
            torch.testing.assert_close(weights[i][:, rows][:, :, columns], wanted, **tolerance)
            (wanted,) = torch.autograd.grad(wanted, alone, upstream[i][:, rows][:, :, columns])
            torch.testing.assert_close(
                gradient[i][:, rows][:, :, columns], wanted, **{**tolerance, "atol": 4 * tolerance["atol"]}
            )


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_mask_of_one_side_alone(side):
    scores = draw(2, 2, 5, 6)
    real = torch.arange(5 if side == "query" else 6).expand(2, -1) < 3
    block = (slice(None), slice(None), slice(3)) if side == "query" else (..., slice(3))
    weights = sinkhorn(scores, 5, mask=AttentionMask(**{side: real}))
    torch.testing.assert_close(weights[block], sinkhorn(scores[block], 5))
    assert weights.count_nonzero() == weights[block].numel()


@pytest.mark.parametrize("hidden", ["query", "key", "both"])
def test_a_fully_masked_sample_is_zero_and_leaves_the_others_alone(hidden):
    scores = draw(3, 2, 4, 5).requires_grad_()
    real = {"query": torch.ones(3, 4, dtype=torch.bool), "key": torch.ones(3, 5, dtype=torch.bool)}
    for name in real if hidden == "both" else [hidden]:
        real[name][1] = False
    weights = sinkhorn(scores, 3, mask=AttentionMask(**real))
    weights.square().sum().backward()
    assert scores.grad is not None
    assert not weights[1].any()
    assert not scores.grad[1].any()
    torch.testing.assert_close(weights[[0, 2]], sinkhorn(scores[[0, 2]], 3))
    assert scores.grad[[0, 2]].abs().amax() > 1e-3
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(10, 10), (6, 9)])
def test_constants_added_to_rows_or_columns_vanish_at_convergence(shape):
    scores = draw(1, 2, *shape)
    rows, columns = 3 * draw(1, 2, shape[0], 1, seed=1), 3 * draw(1, 2, 1, shape[1], seed=2)
    torch.testing.assert_close(sinkhorn(scores + rows + columns, 1001), sinkhorn(scores, 1001), rtol=0, atol=1e-10)
    assert (sinkhorn(scores + columns, 1) - sinkhorn(scores, 1)).abs().max() > 0.01


@pytest.mark.parametrize("n_iters", [1, 2, 3, 6])
def test_permuting_queries_and_keys_permutes_the_weights(n_iters):
    scores, rows, columns = draw(2, 2, 6, 9), torch.tensor([3, 0, 5, 1, 4, 2]), torch.arange(8, -1, -1)
    moved = scores[..., rows, :][..., columns]
    wanted = sinkhorn(scores, n_iters)[..., rows, :][..., columns]
    torch.testing.assert_close(sinkhorn(moved, n_iters), wanted, rtol=1e-12, atol=1e-15)


def test_lam_zero_is_softmax_and_lam_one_is_sinkhorn():
    scores = draw(2, 2, 5, 8)
    torch.testing.assert_close(sinkhorn(scores, 7, lam=0.0), softmax(scores))
    torch.testing.assert_close(sinkhorn(scores, 7, lam=1.0), naive(scores, 7))


def test_lam_per_head():
    scores, lam = draw(2, 3, 5, 8), torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    weights = sinkhorn(scores, 7, lam=lam)
    for head, value in enumerate(lam.tolist()):
        torch.testing.assert_close(weights[:, head], sinkhorn(scores[:, head], 7, lam=value))


def test_the_damped_limit_is_unbalanced_transport():
    """Its optimality condition: column sums c and plan sums p satisfy g = -rho log(p / c), rho = lam / (1 - lam)."""
    scores, lam = draw(6, 9), 0.75
    plan = sinkhorn(scores, 1001, lam=lam)
    f_plus_g = plan.log() - scores
    g = f_plus_g - f_plus_g[:, :1]
    wanted = -lam / (1 - lam) * (plan.sum(-2) / (6 / 9)).log()
    torch.testing.assert_close(g, (wanted - wanted[0]).expand(6, 9), rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_iters", [1, 2, 3, 5])
def test_gradcheck(masked, n_iters):
    scores = draw(2, 2, 3, 4).requires_grad_()
    lam = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    mask = AttentionMask(torch.tensor([[1, 1, 0], [1, 1, 1]]) > 0, torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]]) > 0)

    def weights(scores: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return sinkhorn(scores, n_iters, mask=mask if masked else None, lam=lam)

    assert torch.autograd.gradcheck(weights, (scores, lam), atol=1e-8, rtol=1e-6)


def test_gradcheck_of_the_marginals():
    scores = draw(2, 1, 3, 4).requires_grad_()
    row, column = (draw(2, 1, size, seed=size).abs().requires_grad_() for size in (3, 4))

    def weights(scores, row, column):
        row, column = row / row.sum(-1, keepdim=True), column / column.sum(-1, keepdim=True)
        return sinkhorn(scores, 4, row_marginal=row, column_marginal=column)

    assert torch.autograd.gradcheck(weights, (scores, row, column), atol=1e-8, rtol=1e-6)


def test_a_marginal_of_zero_takes_part_no_more():
    scores = draw(4, 5).requires_grad_()
    row = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    column = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    weights = sinkhorn(scores, 201, row_marginal=row, column_marginal=column)
    weights.square().sum().backward()
    assert scores.grad is not None
    assert not weights[1].any()
    assert not weights[:, 2].any()
    assert not scores.grad[1].any()
    assert not scores.grad[:, 2].any()
    torch.testing.assert_close(weights.sum(-1), row)
    torch.testing.assert_close(weights.sum(-2), column)


@pytest.mark.parametrize("n_iters", [0, -1, True, 2.0, "3", None])
def test_a_wrong_number_of_half_steps_is_refused(n_iters):
    with pytest.raises(ValueError, match="n_iters must be an integer of at least 1"):
        sinkhorn(draw(3, 3), n_iters)


def test_one_marginal_alone_is_refused():
    with pytest.raises(ValueError, match="both row_marginal and column_marginal"):
        sinkhorn(draw(3, 3), row_marginal=torch.ones(3))
    with pytest.raises(ValueError, match="both row_marginal and column_marginal"):
        sinkhorn(draw(3, 3), column_marginal=torch.ones(3))


def test_marginals_that_dont_fit_are_refused():
    with pytest.raises(ValueError, match="equal totals"):
        sinkhorn(draw(3, 3), row_marginal=torch.ones(3), column_marginal=torch.ones(3) * 2)
    with pytest.raises(ValueError, match="don't fit scores"):
        sinkhorn(draw(3, 3), row_marginal=torch.ones(4), column_marginal=torch.ones(3))


@pytest.mark.parametrize("function", [sinkhorn, marginal_error])
def test_pairs_are_refused(function):
    mask = AttentionMask(pairs=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="forbidden pairs"):
        function(draw(1, 1, 3, 3), mask=mask)


@pytest.mark.parametrize("function", [sinkhorn, softmax, marginal_error])
@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 1)])
def test_a_mask_of_another_size_is_refused(function, shape):
    with pytest.raises(ValueError, match="doesn't fit a tensor"):
        function(draw(2, 1, 3, 3), mask=AttentionMask(key=torch.ones(shape, dtype=torch.bool)))


@pytest.mark.parametrize("n_iters", [1, 3, 21])
@pytest.mark.parametrize("dtype", OUTPUT, ids=str)
def test_large_scores_stay_finite(n_iters, dtype):
    scores = (draw(1, 2, 64, 48) * (1e3 if dtype == torch.float16 else 1e4)).to(dtype).requires_grad_()
    weights = sinkhorn(scores, n_iters)
    weights.square().sum().backward()
    assert scores.grad is not None
    assert weights.isfinite().all()
    assert scores.grad.isfinite().all()


def test_leading_axes():
    scores = draw(2, 3, 4, 5)
    wanted = sinkhorn(scores, 3)
    torch.testing.assert_close(sinkhorn(scores[0, 0], 3), wanted[0, 0])
    torch.testing.assert_close(sinkhorn(scores[:, 0], 3), wanted[:, 0])
    two_d = AttentionMask(torch.tensor([[True, True, False, True]]))
    torch.testing.assert_close(
        sinkhorn(scores[0, 0], 3, mask=two_d), sinkhorn(scores[:1, :1], 3, mask=two_d)[0, 0]
    )  # fmt: skip


def test_autocast_changes_nothing():
    scores = draw(2, 2, 16, 16, dtype=torch.float32) * 3
    with torch.autocast("cpu", torch.bfloat16):
        weights = sinkhorn(scores, 5)
    torch.testing.assert_close(weights, sinkhorn(scores, 5), rtol=0, atol=0)


# The residual


def test_marginal_error_by_hand():
    plan = torch.tensor([[[[0.5, 0.4], [0.2, 0.8]]]], dtype=torch.float64)
    assert marginal_error(plan).item() == pytest.approx(0.3)  # the first column sums to 0.7
    plan = torch.tensor([[[[0.5, 0.1, 0.0], [0.5, 0.5, 0.5]]]], dtype=torch.float64)
    assert marginal_error(plan).item() == pytest.approx(0.5)  # the columns are 1, 0.6, 0.5 of 2/3; the rows 0.6 and 1.5
    rectangular = torch.full((1, 1, 2, 4), 0.25, dtype=torch.float64)
    assert marginal_error(rectangular).item() == 0


@pytest.mark.parametrize(("n_iters", "known"), [(1, 1.22), (3, 0.28), (5, 0.10), (7, 0.04), (21, 4e-4)])
def test_marginal_error_of_random_scores_falls_as_known(n_iters, known):
    errors = marginal_error(sinkhorn(2 * draw(64, 1, 65, 65), n_iters))
    assert errors.shape == (64, 1)
    assert errors.mean().item() == pytest.approx(known, rel=0.35 if n_iters < 21 else 1.0)


def test_marginal_error_counts_real_tokens_only():
    scores, mask = draw(2, 2, 5, 6), AttentionMask(torch.arange(5).expand(2, -1) < 3, torch.arange(6).expand(2, -1) < 4)
    weights = sinkhorn(scores, 3, mask=mask)
    torch.testing.assert_close(
        marginal_error(weights.where(weights > 0, 7.0), mask), marginal_error(weights[..., :3, :4])
    )


def test_marginal_error_of_an_empty_sample_is_zero():
    mask = AttentionMask(key=torch.tensor([[True, True], [False, False]]))
    errors = marginal_error(sinkhorn(draw(2, 1, 3, 2), 101, mask=mask), mask)
    assert errors[1].item() == 0
    assert errors[0].item() < 1e-6


def test_lam_and_scores_out_of_range_are_refused():
    for lam in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):
            sinkhorn(torch.randn(3, 3), lam=lam)
    with pytest.raises(ValueError, match="two axes"):
        sinkhorn(torch.randn(3))
    with pytest.raises(TypeError, match="float tensor"):
        sinkhorn(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="don't fit scores"):
        sinkhorn(torch.randn(2, 2, 3, 3), row_marginal=torch.ones(2, 3), column_marginal=torch.ones(2, 3))
