"""The SymmetricSinkhorn class over its function, and what it refuses."""

import pytest
import torch

from sinkformer_pl.models.multi_head_attention import MultiHeadAttention
from sinkformer_pl.normalizations import Sinkhorn, Softmax
from sinkformer_pl.normalizations.symmetric_sinkhorn import SymmetricSinkhorn
from sinkformer_pl.ops import AttentionMask, causal_pairs, marginal_error
from sinkformer_pl.ops.symmetric_sinkhorn import symmetric_sinkhorn

REAL = torch.arange(5).expand(2, -1) < torch.tensor([[4], [5]])
MASKS = [None, AttentionMask(), AttentionMask(REAL, REAL)]


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, width, generator=generator, dtype=torch.float64) for width in (8, 4)]


@pytest.mark.parametrize("n_iters", [1, 2, 3, 10])
@pytest.mark.parametrize("mask", MASKS)
def test_weights_are_those_of_the_function(n_iters, mask):
    q, v = inputs()
    scale, module = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), SymmetricSinkhorn(n_iters)
    scores = torch.einsum("bhqd,bhkd,h->bhqk", q, q, scale)
    weights = module.weights(q, q, mask, scale=scale)
    torch.testing.assert_close(weights, symmetric_sinkhorn(scores, n_iters, mask=mask))
    torch.testing.assert_close(module.attend(q, q, v, mask, scale=scale), weights @ v)


@pytest.mark.parametrize("mask", MASKS)
def test_one_step_is_softmax_and_many_are_sinkhorn(mask):
    q, v = inputs()
    for n_iters, other in ((1, Softmax()), (101, Sinkhorn(20001))):
        found, wanted = (m.attend(q, q, v, mask, scale=0.3) for m in (SymmetricSinkhorn(n_iters), other))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_an_attention_layer_ties_its_projections():
    """In self-attention the layer trains, and its columns are far nearer to 1 than Sinkhorn's after as many steps."""
    torch.manual_seed(0)
    layer, other = (MultiHeadAttention(16, 2, make) for make in (SymmetricSinkhorn, Sinkhorn))
    x = 2 * torch.randn(2, 5, 16)
    layer(x, x, AttentionMask(REAL, REAL)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    other.query, other.key = layer.query, layer.query
    found, untied = (marginal_error(module.weights(x, x)) for module in (layer, other))
    assert found.mean() < 0.5 * untied.mean()


@pytest.mark.parametrize("method", ["attend", "weights"])
def test_what_isnt_symmetric_is_refused_in_one_line(method):
    q, v = inputs()

    def call(k, mask=None, bias=None):
        tensors = (q, k, v) if method == "attend" else (q, k)
        return getattr(SymmetricSinkhorn(), method)(*tensors, mask, scale=1.0, bias=bias)

    call(q)
    for other in (q.clone(), q.view_as(q), torch.cat((q, q), -2)):
        with pytest.raises(ValueError, match=r"same tensor as q and k, or use Sinkhorn$"):
            call(other)
    for mask in (AttentionMask(REAL), AttentionMask(key=REAL), AttentionMask(REAL, REAL.clone())):
        with pytest.raises(ValueError, match=r"same tensor as query and key of AttentionMask$"):
            call(q, mask)
    with pytest.raises(NotImplementedError, match=r"takes no bias: .* use Softmax or Sinkhorn$"):
        call(q, bias=torch.zeros(5, 5))
    with pytest.raises(NotImplementedError, match="pairs"):
        call(q, AttentionMask(pairs=causal_pairs(5, 5)))


def test_numbers_of_steps():
    assert repr(SymmetricSinkhorn()) == "SymmetricSinkhorn(n_iters=3)"
    assert SymmetricSinkhorn(2).promises.unit_columns
    assert not SymmetricSinkhorn(1).promises.unit_columns
    with pytest.raises(ValueError, match="n_iters must be an integer of at least 1"):
        SymmetricSinkhorn(0)
