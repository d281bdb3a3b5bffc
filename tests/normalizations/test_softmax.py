"""Softmax through fused attention, against PyTorch's own and against its weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.ops import AttentionMask, causal_pairs

SCALE = 1 / math.sqrt(8)
QUERY = torch.tensor([[True, True, True, False, True], [True, False, True, True, True]])
KEY = torch.tensor([[True, False, True, True, True, False], [False, True, True, False, True, True]])
PAIRS = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(7)) > 0.4
PAIRS[:, :, 2] = False
MASKS = {
    "none": None,
    "empty": AttentionMask(),
    "query": AttentionMask(QUERY),
    "key": AttentionMask(key=KEY),
    "both": AttentionMask(QUERY, KEY),
    "pairs": AttentionMask(pairs=PAIRS),
    "pairs of all samples": AttentionMask(QUERY, KEY, PAIRS[:1, :1]),
    "all three": AttentionMask(QUERY, KEY, PAIRS),
}


def inputs(dtype=torch.float64, size=(5, 6), std=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, size[0], 8), (2, 3, size[1], 8), (2, 3, size[1], 4))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    bias = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q * std, k, v, bias)]


def gradients(output, leaves):
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(output, leaves, upstream.to(output.dtype))


def relative(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_attend_against_pytorch(kind, with_bias):
    q, k, v, bias = inputs()
    mask, leaves = MASKS[kind], [q, k, v, bias] if with_bias else [q, k, v]
    output = Softmax().attend(q, k, v, mask, scale=SCALE, bias=bias if with_bias else None)
    allowed = (mask or AttentionMask()).allowed(torch.zeros(2, 3, 5, 6)).expand(2, 3, 5, 6)
    additive = torch.where(allowed, bias if with_bias else 0.0, float("-inf")).to(q.dtype)
    wanted = F.scaled_dot_product_attention(q, k, v, additive).where(allowed.any(-1, keepdim=True), 0.0)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for found, right in zip(gradients(output, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(found, right.nan_to_num(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "scale", [SCALE, torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)], ids=["number", "per head"]
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_attend_is_weights_times_values(kind, with_bias, scale):
    q, k, v, bias = inputs()
    given = {"scale": scale, "bias": bias if with_bias else None}
    leaves = [q, k, v, bias] if with_bias else [q, k, v]
    output = Softmax().attend(q, k, v, MASKS[kind], **given)
    wanted = Softmax().weights(q, k, MASKS[kind], **given) @ v
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for found, right in zip(gradients(output, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)


def test_weights_by_hand():
    q, k, _, bias = (x.detach() for x in inputs())
    scale = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    scores = torch.einsum("bhqd,bhkd,h->bhqk", q, k, scale) + bias
    torch.testing.assert_close(Softmax().weights(q, k, None, scale=scale, bias=bias), scores.softmax(-1))


def test_a_learned_scale_gets_its_gradient():
    q, k, v, _ = (x.detach() for x in inputs())
    scale = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: Softmax().attend(q, k, v, MASKS["both"], scale=s), (scale,), atol=1e-8)


def test_causal_pairs_are_pytorchs_causal_attention():
    q, k, v, _ = inputs(size=(6, 6))
    output = Softmax().attend(q, k, v, AttentionMask(pairs=causal_pairs(6, 6)), scale=SCALE)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["number", "tensor", "bias"])
@pytest.mark.parametrize("std", [1, 10])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_loses_no_more_than_the_last_cast(dtype, tolerance, std, kind, masked):
    """The scale of each head and the bias may come in float32, as under mixed precision."""
    q, k, v, _ = (x.detach() for x in inputs(dtype, (64, 128), std))
    bias = std * torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(3)) if kind == "bias" else None
    mask = AttentionMask(key=torch.arange(128).expand(2, -1) < 100) if masked else None
    scale = torch.full((3,), SCALE) if kind == "tensor" else SCALE
    output = Softmax().attend(q, k, v, mask, scale=scale, bias=bias)
    exact_bias = None if bias is None else bias.double()
    wanted = Softmax().attend(q.double(), k.double(), v.double(), mask, scale=SCALE, bias=exact_bias)
    assert output.dtype == dtype
    assert relative(output, wanted) <= tolerance


def test_a_large_bias_at_the_padding_leaves_half_precision_gradients_finite():
    q, k, v, _ = inputs(torch.float16)
    mask = MASKS["both"]
    bias = torch.zeros(2, 3, 5, 6).where(mask.allowed(torch.zeros(2, 3, 5, 6)), 1e30)
    output = Softmax().attend(q, k, v, mask, scale=SCALE, bias=bias)
    assert all(gradient.isfinite().all() for gradient in gradients(output, [q, k, v]))


def test_autocast_keeps_float32():
    q, k, v, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = Softmax().attend(q, k, v, None, scale=SCALE)
    assert output.equal(Softmax().attend(q, k, v, None, scale=SCALE))


@pytest.mark.parametrize("masked", [False, True])
def test_bias_of_fewer_axes_and_float64_scale(masked):
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    mask = AttentionMask(key=torch.tensor([[True] * 5, [True] * 3 + [False] * 2])) if masked else None
    bias, scale = torch.randn(5), torch.ones(3, dtype=torch.float64)
    attended = Softmax().attend(q, k, v, mask, scale=scale, bias=bias)
    expected = Softmax().weights(q, k, mask, scale=scale, bias=bias) @ v
    torch.testing.assert_close(attended, expected)


def test_half_precision_keeps_one_rounding_of_a_scale_for_each_head_under_autocast():
    q, k, v, _ = (x.detach() for x in inputs(torch.bfloat16))
    scale = torch.tensor([0.2, 1.0, 3.0])
    with torch.autocast("cpu", torch.bfloat16):
        output = Softmax().attend(q, k, v, MASKS["all three"], scale=scale)
    wanted = Softmax().attend(q.float(), k.float(), v.float(), MASKS["all three"], scale=scale)
    assert output.dtype == torch.bfloat16
    assert output.equal(wanted.to(torch.bfloat16))
