"""The Sigmoid class over its function."""

import math
from typing import Any

import pytest
import torch

from sinkformer_pl.normalizations.sigmoid import Sigmoid
from sinkformer_pl.ops import AttentionMask, causal_pairs


def inputs(queries=5):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, queries, 8), (2, 3, 6, 8), (2, 3, 6, 4), (2, 3, queries, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_minus_log_of_the_keys_that_a_query_meets_by_default():
    q, k, v, bias = inputs(6)
    scale = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    scores = torch.einsum("bhqd,bhkd,h->bhqk", q, k, scale) + bias
    causal = AttentionMask(pairs=causal_pairs(6, 6))
    n = torch.arange(1, 7)[:, None]
    wanted = (1 / (1 + n * (-scores).exp())).tril()
    torch.testing.assert_close(Sigmoid().weights(q, k, causal, scale=scale, bias=bias), wanted)
    torch.testing.assert_close(Sigmoid().attend(q, k, v, causal, scale=scale, bias=bias), wanted @ v)


@pytest.mark.parametrize("number", [0, -1.5, -math.log(6)])
def test_a_given_bias(number):
    q, k, _, _ = inputs()
    wanted = (q @ k.mT + number).sigmoid()
    torch.testing.assert_close(Sigmoid(bias=number).weights(q, k, None, scale=1.0), wanted)
    assert Sigmoid().weights(q, k, None, scale=1.0).allclose(wanted) == (number == -math.log(6))


def test_repr():
    assert [repr(Sigmoid(bias)) for bias in (None, -2.0)] == ["Sigmoid(bias=-log n)", "Sigmoid(bias=-2.0)"]


@pytest.mark.parametrize("bias", [math.inf, math.nan, True, "-log n"])
def test_wrong_biases_are_refused(bias: Any):
    with pytest.raises(ValueError, match=f"Sigmoid: bias must be a finite number, or None for -log n, got {bias!r}"):
        Sigmoid(bias)
