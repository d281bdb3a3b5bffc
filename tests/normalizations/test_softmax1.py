"""Softmax1 through fused attention, against PyTorch's own with one more key."""

import math

import pytest
import torch
import torch.nn.functional as F

from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.normalizations.softmax1 import Softmax1
from sinkformer_pl.ops import AttentionMask, causal_pairs

SCALE = 1 / math.sqrt(8)
QUERY = torch.tensor([[True, True, True, False, True], [True, False, True, True, True]])
KEY = torch.tensor([[True, False, True, True, True, False], [False] * 6])
PAIRS = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(7)) > 0.4
PAIRS[:, :, 2] = False
MASKS = {
    "none": None,
    "query": AttentionMask(QUERY),
    "both": AttentionMask(QUERY, KEY),
    "causal": AttentionMask(pairs=causal_pairs(5, 6)),
    "all three": AttentionMask(QUERY, KEY, PAIRS),
}


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4), (2, 3, 5, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(output, leaves):
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(output, leaves, upstream.to(output.dtype))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_attend_is_pytorchs_with_one_more_key_and_value_of_zeros(kind, with_bias):
    q, k, v, bias = inputs()
    leaves = [q, k, v, bias] if with_bias else [q, k, v]
    output = Softmax1().attend(q, k, v, MASKS[kind], scale=SCALE, bias=bias if with_bias else None)
    allowed = (MASKS[kind] or AttentionMask()).allowed(torch.zeros(2, 3, 5, 6)).expand(2, 3, 5, 6)
    additive = torch.where(allowed, bias if with_bias else 0.0, -math.inf).to(q.dtype)
    additive = torch.cat([additive, torch.zeros(2, 3, 5, 1)], -1)
    k1, v1 = (torch.cat([x, torch.zeros_like(x[..., :1, :])], -2) for x in (k, v))
    wanted = F.scaled_dot_product_attention(q, k1, v1, additive, scale=SCALE)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for found, right in zip(gradients(output, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [SCALE, torch.tensor([0.2, 1.0, 3.0])], ids=["number", "per head"])
@pytest.mark.parametrize("kind", MASKS)
def test_attend_is_weights_times_values(kind, scale):
    q, k, v, bias = inputs()
    given = {"scale": scale, "bias": bias}
    output, wanted = (
        Softmax1().attend(q, k, v, MASKS[kind], **given),
        Softmax1().weights(q, k, MASKS[kind], **given) @ v,
    )
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for found, right in zip(gradients(output, [q, k, v, bias]), gradients(wanted, [q, k, v, bias]), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)


def test_rows_are_those_of_softmax_lowered_by_the_sink():
    q, k, _, bias = (x.detach() for x in inputs())
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE + bias
    total = scores.exp().sum(-1, keepdim=True)
    wanted = Softmax().weights(q, k, None, scale=SCALE, bias=bias) * total / (1 + total)
    torch.testing.assert_close(Softmax1().weights(q, k, None, scale=SCALE, bias=bias), wanted)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "all three"])
def test_bfloat16_loses_no_more_than_the_last_cast(kind, bias_dtype):
    q, k, v, bias = (x.detach() for x in inputs(torch.bfloat16))
    bias = None if bias_dtype is None else bias.to(bias_dtype) + (0.001 if bias_dtype == torch.float32 else 0)
    output = Softmax1().attend(q, k, v, MASKS[kind], scale=SCALE, bias=bias)
    exact_bias = None if bias is None else bias.double()
    wanted = Softmax1().attend(q.double(), k.double(), v.double(), MASKS[kind], scale=SCALE, bias=exact_bias)
    assert output.dtype == torch.bfloat16
    assert float((output.double() - wanted).norm() / wanted.norm()) < 4e-3
