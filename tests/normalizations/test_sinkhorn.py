"""The Sinkhorn class over its function."""

from functools import partial
from typing import Any

import pytest
import torch

from sinkformer_pl import ops
from sinkformer_pl.normalizations import Sinkhorn, Softmax
from sinkformer_pl.ops import AttentionMask, causal_pairs
from sinkformer_pl.testing import check_normalization


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4), (2, 3, 5, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("n_iters", [1, 3, 5, 21])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_the_function(n_iters, masked):
    q, k, v, bias = inputs()
    mask = AttentionMask(torch.arange(5).expand(2, -1) < 4, torch.arange(6).expand(2, -1) > 1) if masked else None
    scale = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    scores = torch.einsum("bhqd,bhkd,h->bhqk", q, k, scale) + bias
    weights = Sinkhorn(n_iters).weights(q, k, mask, scale=scale, bias=bias)
    torch.testing.assert_close(weights, ops.sinkhorn(scores, n_iters, mask=mask))
    torch.testing.assert_close(Sinkhorn(n_iters).attend(q, k, v, mask, scale=scale, bias=bias), weights @ v)


def test_one_half_step_is_softmax():
    q, k, v, bias = inputs()
    found, wanted = (c.attend(q, k, v, None, scale=0.5, bias=bias) for c in (Sinkhorn(n_iters=1), Softmax()))
    torch.testing.assert_close(found, wanted)


def test_three_half_steps_by_default():
    assert Sinkhorn().n_iters == 3
    assert "n_iters=3" in repr(Sinkhorn())


@pytest.mark.parametrize("n_iters", [0, -1, 2, 4, True, 3.0, "3", None])
def test_numbers_of_half_steps_that_dont_end_on_rows_are_refused(n_iters: Any):
    with pytest.raises(ValueError, match=f"use an odd number.*, got {n_iters!r}"):
        Sinkhorn(n_iters)


def test_pairs_are_refused_with_the_reason():
    q, k, v, _ = inputs()
    mask = AttentionMask(pairs=causal_pairs(5, 6))
    with pytest.raises(NotImplementedError, match="doubly stochastic matrix with that pattern may not exist"):
        Sinkhorn().attend(q, k, v, mask, scale=1.0)
    with pytest.raises(NotImplementedError, match="use Softmax"):
        Sinkhorn().weights(q, k, mask, scale=1.0)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
def test_the_gradient_is_the_one_that_is_chosen(gradient):
    q, k, v, bias = (tensor.requires_grad_() for tensor in inputs())
    module = Sinkhorn(n_iters=5, gradient=gradient)
    found = torch.autograd.grad(module.attend(q, k, v, bias=bias).sin().sum(), (q, k, v, bias))
    output = ops.sinkhorn_attention(q, k, v, n_iters=5, bias=bias, gradient=gradient)
    for one, wanted in zip(found, torch.autograd.grad(output.sin().sum(), (q, k, v, bias)), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-9)
    exact = Sinkhorn(n_iters=5).attend(q, k, v, bias=bias).sin().sum()
    difference = (torch.autograd.grad(exact, q)[0] - found[0]).abs().max()
    assert (difference > 1e-4) == (gradient != "unrolled")
    assert module.promises.exact_gradient == (gradient == "unrolled")


def test_gradients_that_there_arent_are_refused():
    wrong: Any = "exact"
    with pytest.raises(ValueError, match="gradient must be one of unrolled, implicit, detached, got 'exact'"):
        Sinkhorn(gradient=wrong)
    with pytest.raises(ValueError, match="n_iters=1 has no column step"):
        Sinkhorn(1, gradient="implicit")


def test_a_detached_gradient_keeps_the_rest_of_the_contract():
    check_normalization(
        partial(Sinkhorn, gradient="detached"), converged=partial(Sinkhorn, n_iters=101), compiled=False
    )
