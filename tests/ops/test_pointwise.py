"""Sigmoid and ReLU attention against formulas in numpy."""

import math

import numpy as np
import pytest
import torch

from sinkformer_pl.ops import AttentionMask, causal_pairs
from sinkformer_pl.ops.pointwise import relu, sigmoid

PAIRS = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.3
PAIRS[1, 1, 2] = False
MASKS = {
    "none": AttentionMask(),
    "padding": AttentionMask(
        torch.tensor([[True, False, True], [True, True, True]]),
        torch.tensor([[True, False, True, True], [False, True, False, False]]),
    ),
    "no key": AttentionMask(key=torch.tensor([[True] * 4, [False] * 4])),
    "causal": AttentionMask(pairs=causal_pairs(3, 4)),
    "pairs": AttentionMask(key=torch.tensor([[True, False, True, True], [True] * 4]), pairs=PAIRS),
}
FUNCTIONS = {  # and the formula of one row
    "sigmoid": (sigmoid, lambda x: 1 / (1 + len(x) * np.exp(-x))),
    "sigmoid, bias -2": (lambda x, mask=None: sigmoid(x, bias=-2.0, mask=mask), lambda x: 1 / (1 + np.exp(2 - x))),
    "relu": (relu, lambda x: np.where(x > 0, x, 0) / len(x)),
}


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def by_rows(formula, scores, mask):
    allowed = mask.allowed(scores).expand_as(scores).numpy()
    x, weights = scores.double().numpy(), np.zeros(scores.shape)
    for at in np.ndindex(*scores.shape[:-1]):
        if allowed[at].any():
            weights[at][allowed[at]] = formula(x[at][allowed[at]])
    return torch.from_numpy(weights)


@pytest.mark.parametrize("filler", [0.0, 1e30, -1e30])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_numpy(name, kind, filler):
    function, formula = FUNCTIONS[name]
    scores = 2 * draw(2, 2, 3, 4)
    allowed = MASKS[kind].allowed(scores).expand_as(scores)
    filled = scores.where(allowed, filler).requires_grad_()
    weights = function(filled, mask=MASKS[kind])
    torch.testing.assert_close(weights, by_rows(formula, scores, MASKS[kind]), rtol=1e-12, atol=1e-14)
    assert not weights[~allowed].any()
    weights.square().sum().backward()
    assert filled.grad is not None
    assert filled.grad.isfinite().all()
    assert not filled.grad[~allowed].any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name, kind):
    function, _ = FUNCTIONS[name]
    scores = draw(2, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, mask=MASKS[kind]), (scores,), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lower_precision_is_rounded_once(name, dtype):
    function, formula = FUNCTIONS[name]
    scores = (5 * draw(2, 2, 5, 300)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        weights = function(scores)
    assert weights.dtype == dtype
    wanted = by_rows(formula, scores, AttentionMask())
    tolerance = max(torch.finfo(dtype).eps, 3e-6)
    torch.testing.assert_close(weights.double(), wanted, rtol=tolerance, atol=1e-7 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_large_scores_stay_finite(name):
    scores = torch.linspace(-1e4, 1e4, 9).reshape(1, 1, 1, 9).requires_grad_()
    weights = FUNCTIONS[name][0](scores)
    weights.square().sum().backward()
    assert weights.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_a_row_of_zeros_sums_to_about_one_under_sigmoid():
    assert float(sigmoid(torch.zeros(1, 1, 1, 100)).sum()) == pytest.approx(100 / 101)


def test_one_key_has_the_plain_function():
    scores = draw(2, 2, 3, 1)
    torch.testing.assert_close(sigmoid(scores), scores.sigmoid())
    torch.testing.assert_close(relu(scores), scores.relu())


def test_a_bias_of_zero_is_honoured():
    assert float(sigmoid(torch.zeros(1, 1, 1, 4), bias=0.0)[0, 0, 0, 0]) == 0.5
    assert float(sigmoid(torch.zeros(1, 1, 1, 4), bias=-math.log(3))[0, 0, 0, 0]) == pytest.approx(0.25)
