"""The Softpick class over its function."""

import torch

from sinkformer_pl.normalizations.softpick import Softpick
from sinkformer_pl.ops import AttentionMask, causal_pairs


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_weights_and_attend_by_hand():
    q, k, v = inputs()
    bias = torch.linspace(-1, 1, 6, dtype=torch.float64)
    causal = AttentionMask(pairs=causal_pairs(6, 6))
    excess = ((q @ k.mT / 2 + bias).exp() - 1).tril()
    wanted = excess.clamp(min=0) / (excess.abs().sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(Softpick().weights(q, k, causal, scale=0.5, bias=bias), wanted)
    torch.testing.assert_close(Softpick().attend(q, k, v, causal, scale=0.5, bias=bias), wanted @ v)


def test_keys_of_negative_score_have_no_weight_but_a_gradient():
    q, k, v = inputs()
    k.requires_grad_()
    scores = q[:, :, :1] @ k.mT
    weights = Softpick().weights(q[:, :, :1], k, None, scale=1.0)
    assert (weights == 0).equal(scores <= 0)
    Softpick().attend(q[:, :, :1], k, v, None, scale=1.0).square().sum().backward()
    some_positive = (scores > 0).any(-1, keepdim=True)
    assert k.grad is not None
    assert k.grad[((scores < 0) & some_positive).squeeze(-2)].abs().sum(-1).all()


def test_a_query_without_a_positive_score_attends_to_nothing():
    q, k, v = (x.abs() for x in inputs())
    assert not Softpick().attend(q, -k, v, None, scale=1.0).any()
