"""The ReLU class over its function."""

import torch

from sinkformer_pl.normalizations.relu import ReLU
from sinkformer_pl.ops import AttentionMask


def test_weights_and_attend_by_hand():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (5, 6, 6))
    bias = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    mask = AttentionMask(key=torch.arange(6) < torch.tensor([[4], [2]]))
    weights = ReLU().weights(q, k, mask, scale=0.5, bias=bias)
    scores = q @ k.mT / 2 + bias
    for sample, n in enumerate((4, 2)):
        torch.testing.assert_close(weights[sample, ..., :n], scores[sample, ..., :n].clamp(min=0) / n)
        assert not weights[sample, ..., n:].any()
    assert 0.3 < (weights[0, ..., :4] == 0).double().mean() < 0.7
    torch.testing.assert_close(ReLU().attend(q, k, v, mask, scale=0.5, bias=bias), weights @ v)
