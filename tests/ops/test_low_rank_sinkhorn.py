"""Low-rank couplings against entropic transport, and what they promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkformer_pl.ops import AttentionMask, causal_pairs, marginal_error
from sinkformer_pl.ops.low_rank_sinkhorn import low_rank_sinkhorn
from tests.optional import ot

QUERY = torch.tensor([[True, False, True, True, True], [False, True, True, False, True]])
KEY = torch.tensor([[True, True, False, True, False, True, True], [True, False, False, False, True, True, False]])


def inputs(queries=5, keys=7, width=4, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, queries, width), (2, 3, keys, width), (3, rank, width), (3, rank))
    q, k, pivots, logits = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, pivots, logits.softmax(-1)


def weights(q, k, pivots, masses, n_iters=5, **arguments):
    plan = low_rank_sinkhorn(q, k, pivots, masses, n_iters, **arguments)
    return plan.to_pivots @ plan.to_keys


@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (9, 20)])
def test_the_limit_is_two_plans_of_entropic_transport_glued_at_the_pivots(queries, keys):
    q, k, pivots, masses = inputs(queries, keys)
    scale = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    found = weights(q, k, pivots, masses, 3001, scale=scale)
    options = {"method": "sinkhorn_log", "numItermax": 20000, "stopThr": 1e-14}
    for sample, head in np.ndindex(2, 3):
        z, centre = masses[head].numpy(), pivots[head].numpy()
        left, right = (-float(scale[head]) * x[sample, head].numpy() @ centre.T for x in (q, k))
        first = ot.sinkhorn(np.full(queries, 1 / queries), z, left, 1.0, **options)
        second = ot.sinkhorn(z, np.full(keys, 1 / keys), right.T, 1.0, **options)
        glued = queries * first @ np.diag(1 / z) @ second
        torch.testing.assert_close(found[sample, head], torch.from_numpy(glued), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n_iters", [1, 3, 7])
def test_both_couplings_end_on_their_own_rows(n_iters):
    """By hand: each coupling alternates rows and columns, rows first and last."""
    q, k, pivots, masses = inputs()

    def coupled(scores, rows, columns):
        plan = scores.exp()
        for step in range(n_iters):
            axis, wanted = (-1, rows[..., None]) if step % 2 == 0 else (-2, columns[..., None, :])
            plan = plan / plan.sum(axis, keepdim=True) * wanted
        return plan

    uniform_q, uniform_k = torch.full((5,), 1 / 5).double(), torch.full((7,), 1 / 7).double()
    first = coupled(0.5 * q @ pivots.mT, uniform_q, masses)
    second = coupled(0.5 * pivots @ k.mT, masses, uniform_k)
    wanted = 5 * first @ torch.diag_embed(1 / masses) @ second
    torch.testing.assert_close(weights(q, k, pivots, masses, n_iters, scale=0.5), wanted)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.sampled_from([1, 3, 5]), st.sampled_from([0.3, 4.0])
)
def test_rows_sum_to_1_and_the_rank_is_that_of_the_pivots(queries, keys, rank, n_iters, scale):
    found = weights(*inputs(queries, keys, 4, rank), n_iters, scale=scale)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, queries, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (torch.linalg.matrix_rank(found, rtol=1e-10) <= rank).all()


@pytest.mark.parametrize("mask", [None, AttentionMask(QUERY, KEY)])
def test_columns_come_near_the_marginal_with_the_half_steps(mask):
    errors = [float(marginal_error(weights(*inputs(), n, mask=mask), mask).max()) for n in (1, 3, 21, 1001)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("filler", [-3.0, 1e30])
def test_padding_leaves_the_marginals(filler):
    q, k, pivots, masses = inputs()
    q, k = q.where(QUERY[:, None, :, None], filler), k.where(KEY[:, None, :, None], filler)
    plan = low_rank_sinkhorn(q.requires_grad_(), k.requires_grad_(), pivots, masses, mask=AttentionMask(QUERY, KEY))
    found = plan.to_pivots @ plan.to_keys
    gradients = torch.autograd.grad(found.sin().sum(), (q, k))
    assert not found[~(QUERY[:, None, :, None] & KEY[:, None, None]).expand_as(found)].any()
    for i, (rows, columns) in enumerate(zip(QUERY, KEY, strict=True)):
        alone = [x.detach()[[i]][:, :, real].requires_grad_() for x, real in ((q, rows), (k, columns))]
        wanted = weights(*alone, pivots, masses)
        torch.testing.assert_close(found[[i]][:, :, rows][..., columns], wanted)
        for got, right, real in zip(
            gradients, torch.autograd.grad(wanted.sin().sum(), alone), (rows, columns), strict=True
        ):
            torch.testing.assert_close(got[[i]][:, :, real], right)
            assert not got[i, :, ~real].any()


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_sample_without_queries_or_keys_has_weights_and_gradients_of_0(side):
    real = torch.ones(2, 5 if side == "query" else 7, dtype=torch.bool)
    real[0] = False
    leaves = [x.requires_grad_() for x in inputs()]
    found = weights(*leaves, mask=AttentionMask(**{side: real}))
    assert not found[0].any()
    torch.testing.assert_close(found[1], weights(*leaves)[1])
    for gradient in torch.autograd.grad(found[0].sum(), leaves):
        assert not gradient.any()


def test_gradients_are_those_of_finite_differences():
    q, k, pivots, masses = (x.requires_grad_() for x in inputs())
    logits, scale = masses.detach().log().requires_grad_(), torch.tensor([0.3, 1.0, 2.0]).double().requires_grad_()
    mask = AttentionMask(QUERY, KEY)
    assert torch.autograd.gradcheck(
        lambda q, k, pivots, logits, scale: weights(q, k, pivots, logits.softmax(-1), 3, scale=scale, mask=mask),
        (q, k, pivots, logits, scale),
        atol=1e-8,
        rtol=1e-6,
    )


def test_a_mass_of_0_is_a_pivot_less():
    q, k, pivots, masses = inputs()
    masses = torch.cat([masses, torch.zeros(3, 1)], -1).requires_grad_()
    more = torch.cat([pivots, torch.full((3, 1, 4), 2.0)], 1)
    found = weights(q, k, more, masses)
    torch.testing.assert_close(found, weights(q, k, pivots, masses[:, :-1]))
    assert torch.autograd.grad(found.sin().sum(), masses)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_in_single_precision_or_above(dtype):
    q, k, pivots, masses = (x.to(dtype) for x in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        plan = low_rank_sinkhorn(q, k, pivots.float(), masses.float(), scale=torch.tensor([1.0, 2.0, 3.0]))
    wanted = torch.promote_types(dtype, torch.float32)
    assert plan.to_pivots.dtype == plan.to_keys.dtype == wanted
    assert math.isclose(float(plan.to_pivots.sum()), 30, rel_tol=1e-5)


@pytest.mark.parametrize("n_iters", [0, 2, -1, True, 3.0])
def test_numbers_of_half_steps_that_dont_end_on_rows_are_refused(n_iters):
    with pytest.raises(ValueError, match=f"use an odd number, got {n_iters!r}"):
        low_rank_sinkhorn(*inputs(), n_iters)


def test_what_doesnt_fit_is_refused():
    q, k, pivots, masses = inputs()
    for bad in ((pivots[:2], masses), (pivots[..., 1:], masses), (pivots, masses[:, 1:]), (pivots[0], masses)):
        with pytest.raises(ValueError, match=r"they need \(3, r, 4\) and \(3, r\)"):
            low_rank_sinkhorn(q, k, *bad)
    with pytest.raises(NotImplementedError, match="can't forbid some"):
        low_rank_sinkhorn(q, k, pivots, masses, mask=AttentionMask(pairs=causal_pairs(5, 7)))
