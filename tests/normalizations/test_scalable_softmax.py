"""ScalableSoftmax: its factor, and attention against Softmax with scores multiplied by it."""

import math
from typing import Any

import pytest
import torch

from sinkformer_pl.models.multi_head_attention import MultiHeadAttention
from sinkformer_pl.normalizations.scalable_softmax import ScalableSoftmax
from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.ops import AttentionMask, causal_pairs

QUERY = torch.tensor([[True, True, True, False, True], [True, False, True, True, True]])
KEY = torch.tensor([[True, False, True, True, True, False], [False, True, False, False, False, False]])
MASKS = {
    "none": None,
    "both": AttentionMask(QUERY, KEY),
    "no key": AttentionMask(key=torch.tensor([[True] * 6, [False] * 6])),
    "causal": AttentionMask(QUERY, KEY, causal_pairs(5, 6)),
}
LOG_N = {  # of each row; 0 also where there is no key
    "none": torch.tensor(6.0).double().log(),
    "both": torch.tensor([4.0, 1.0]).double().log().reshape(2, 1, 1, 1),
    "no key": torch.tensor([6.0, 1.0]).double().log().reshape(2, 1, 1, 1),
    "causal": torch.tensor([[1.0, 1, 2, 3, 4], [1.0, 1, 1, 1, 1]]).double().log().reshape(2, 1, 5, 1),
}


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4), (2, 3, 5, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def made(**arguments):
    """One with a different s in each head, if it is learned."""
    norm = ScalableSoftmax(**arguments)
    norm.build(3, 8)
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.2, 1.0, generator=torch.Generator().manual_seed(1))
    return norm.double()


@pytest.mark.parametrize("scale", [0.5, torch.tensor([0.2, 1.0, 3.0])], ids=["number", "per head"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_it_is_softmax_of_all_scores_times_s_log_n(kind, learned, with_bias, scale):
    q, k, v, bias = inputs()
    norm = made(learned=learned)
    leaves = [q, k, v, *([bias] if with_bias else []), *norm.parameters()]
    output = norm.attend(q, k, v, MASKS[kind], scale=scale, bias=bias if with_bias else None)
    weights = norm.weights(q, k, MASKS[kind], scale=scale, bias=bias if with_bias else None)
    s = norm.factor[:, None, None] if learned else norm.factor
    factor = s * LOG_N[kind]
    scaled_bias = bias * factor if with_bias else None
    wanted = Softmax().weights(q * factor, k, MASKS[kind], scale=scale, bias=scaled_bias)
    torch.testing.assert_close(weights, wanted)
    torch.testing.assert_close(output, wanted @ v)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(output, leaves, upstream)
    for got, right in zip(found, torch.autograd.grad(wanted @ v, leaves, upstream), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MASKS)
def test_half_precision_is_rounded_once(kind, dtype):
    q, k, v, bias = (x.detach() for x in inputs(dtype))
    norm = made(learned=True).float()
    output = norm.attend(q, k, v, MASKS[kind], scale=1.0, bias=bias)
    wanted = norm.attend(q.float(), k.float(), v.float(), MASKS[kind], scale=1.0, bias=bias.float())
    assert output.dtype == dtype
    assert output.equal(wanted.to(dtype))


def test_a_learned_s_is_one_parameter_for_each_head_of_a_layer():
    layer = MultiHeadAttention(16, 4, lambda: ScalableSoftmax(s=0.7, learned=True))
    s = dict(layer.named_parameters())["core.normalization.s"]
    assert s.tolist() == pytest.approx([0.7] * 4)
    layer(torch.randn(2, 5, 16), torch.randn(2, 6, 16)).sum().backward()
    assert s.grad is not None
    assert s.grad.all()


def test_a_fixed_s_is_no_parameter():
    norm = made(s=1 / math.log(6), learned=False)
    assert not list(norm.parameters())
    q, k, v, _ = inputs()
    torch.testing.assert_close(norm.attend(q, k, v, None, scale=0.3), Softmax().attend(q, k, v, None, scale=0.3))


def test_defaults_and_repr():
    assert repr(ScalableSoftmax()) == "ScalableSoftmax(s=0.43, learned=False)"
    assert repr(made(s=2, learned=False)) == "ScalableSoftmax(s=2, learned=False)"


@pytest.mark.parametrize("s", [0, -1.0, math.inf, math.nan, True, "1", None])
def test_wrong_factors_are_refused(s: Any):
    with pytest.raises(ValueError, match=f"ScalableSoftmax: s must be a finite number above 0, got {s!r}"):
        ScalableSoftmax(s)


def test_learned_must_be_a_bool():
    wrong: Any = "no"
    with pytest.raises(ValueError, match="learned must be True or False, got 'no'"):
        ScalableSoftmax(learned=wrong)
