"""Multi-head attention against PyTorch's, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from sinkformer_pl import ops
from sinkformer_pl.models import MultiHeadAttention
from sinkformer_pl.normalizations import Promises, ScoreNormalization, Sinkhorn, Softmax, registered
from sinkformer_pl.ops import AttentionMask

KEYS = torch.tensor([[True, True, True, False, True], [True, False, True, False, False]])


def pair(causal=False):
    torch.manual_seed(0)
    ours = MultiHeadAttention(12, 3, Softmax, causal=causal).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    parts = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]).normal_())
        for part, bias in zip(parts, theirs.in_proj_bias.chunk(3), strict=True):
            part.bias.copy_(bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masked", [False, True])
def test_under_softmax_it_is_pytorchs(masked):
    ours, theirs = pair()
    queries, keys = torch.randn(2, 4, 12).double().requires_grad_(), torch.randn(2, 5, 12).double().requires_grad_()
    output = ours(queries, keys, AttentionMask(key=KEYS) if masked else None)
    wanted, weights = theirs(
        queries, keys, keys, key_padding_mask=~KEYS if masked else None, average_attn_weights=False
    )
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(ours.weights(queries, keys, AttentionMask(key=KEYS) if masked else None), weights)
    for found, right in zip(
        *(torch.autograd.grad(x.square().sum(), [queries, keys]) for x in (output, wanted)), strict=True
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("masked", [False, True])
def test_causal_under_softmax_is_pytorchs(masked):
    ours, theirs = pair(causal=True)
    x, key = (
        torch.randn(2, 5, 12).double(),
        torch.tensor([[True, True, True, True, False], [True, True, True, False, False]]),
    )
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    output = ours(x, x, AttentionMask(key=key) if masked else None)
    wanted, weights = theirs(
        x, x, x, attn_mask=future, key_padding_mask=~key if masked else None, average_attn_weights=False
    )
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(ours.weights(x, x, AttentionMask(key=key) if masked else None), weights)
    changed = x.clone()
    changed[:, 3:] = 9.0
    torch.testing.assert_close(ours(changed, changed)[:, :3], ours(x, x)[:, :3])


def test_causal_attention_keeps_the_pairs_of_its_mask():
    ours, _ = pair(causal=True)
    x, pairs = torch.randn(1, 4, 12).double(), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    pairs[..., 3, 0] = False
    weights = ours.weights(x, x, AttentionMask(pairs=pairs))
    assert (weights[..., 3, 0] == 0).all()
    assert (weights[..., 2, :3] > 0).all()
    assert (weights[..., 2, 3] == 0).all()


def test_under_sinkhorn_each_head_is_balanced():
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 3, lambda: Sinkhorn(n_iters=101)).double()
    queries, keys = torch.randn(2, 4, 12).double(), torch.randn(2, 5, 12).double()
    mask = AttentionMask(key=KEYS)
    assert ops.marginal_error(layer.weights(queries, keys, mask), mask).amax() < 1e-8
    q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2)
               for f, x in ((layer.query, queries), (layer.key, keys), (layer.value, keys)))  # fmt: skip
    weights = ops.sinkhorn(q @ k.mT / math.sqrt(4), 101, mask=mask)
    torch.testing.assert_close(layer(queries, keys, mask), layer.out((weights @ v).transpose(1, 2).reshape(2, 4, 12)))


@pytest.mark.parametrize("num_heads", [0, -1, 5, 24])
def test_heads_that_dont_divide_the_width_are_refused(num_heads):
    with pytest.raises(ValueError, match=f"num_heads={num_heads} must divide the width dim=12"):
        MultiHeadAttention(12, num_heads, Softmax)


@pytest.mark.parametrize("head_dim", [2, 7])
def test_heads_of_another_width(head_dim):
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 5, lambda: Built(), head_dim=head_dim).double()
    assert layer.core.normalization.builds == [(5, head_dim)]
    x, y = torch.randn(2, 4, 12).double(), torch.randn(2, 6, 12).double()
    q, k, v = (f(z).unflatten(-1, (5, head_dim)).transpose(1, 2)
               for f, z in ((layer.query, x), (layer.key, y), (layer.value, y)))  # fmt: skip
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x, y), layer.out(expected))


def test_a_head_without_width_is_refused():
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        MultiHeadAttention(12, 3, Softmax, head_dim=0)


def test_causal_under_sinkhorn_is_refused_when_built():
    with pytest.raises(NotImplementedError, match=r"Sinkhorn can't be causal .*identity.*; use .*Softmax"):
        MultiHeadAttention(12, 3, Sinkhorn, causal=True)


class Built(ScoreNormalization):
    promises = Promises(pairs=True)

    def __init__(self):
        super().__init__()
        self.builds = []

    def build(self, num_heads, head_dim):
        self.builds.append((num_heads, head_dim))
        self.gain = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, scores, mask):
        return ops.softmax(scores * self.gain, mask=mask)


def test_the_normalization_is_its_own_and_built_once():
    first, second = MultiHeadAttention(12, 3, Built), MultiHeadAttention(12, 3, Built)
    assert isinstance(first.core.normalization, Built)
    assert first.core.normalization.builds == [(3, 4)]
    assert first.core.normalization is not second.core.normalization
    assert "core.normalization.gain" in first.state_dict()
    x = torch.randn(2, 4, 12)
    first(x, x)
    assert first.core.normalization.builds == [(3, 4)]


def test_half_precision_under_autocast():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(12, 3, Sinkhorn), torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x, x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x, x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", list(registered()))
def test_a_temperature_divides_the_scores_of_any_normalization(name):
    x = torch.randn(2, 6, 12).double()
    layers = []
    for temperature in (1.0, 2.5, "learned"):
        torch.manual_seed(0)
        layers.append(MultiHeadAttention(12, 3, registered()[name], temperature=temperature).double().eval())
    plain, fixed, learned = layers
    plain.core.scale /= 2.5
    torch.testing.assert_close(fixed(x, x), plain(x, x))
    torch.testing.assert_close(fixed.weights(x, x), plain.weights(x, x))
    with torch.no_grad():
        learned.core.log_temperature.copy_(torch.tensor([2.5, 1.0, 0.4]).log())
    for head, temperature in enumerate((2.5, 1.0, 0.4)):
        torch.manual_seed(0)
        layer = MultiHeadAttention(12, 3, registered()[name], temperature=temperature).double().eval()
        torch.testing.assert_close(learned.weights(x, x)[:, head], layer.weights(x, x)[:, head])
    learned(x, x).square().sum().backward()
    assert (learned.core.log_temperature.grad.abs() > 1e-9).all()


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan, "hot"])
def test_temperatures_that_arent_positive_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number or 'learned', got"):
        MultiHeadAttention(4, 2, Softmax, temperature=temperature)


@pytest.mark.parametrize("name", list(registered()))
def test_projections_start_the_same_under_any_normalization(name):
    states = []
    for normalization in (Softmax, registered()[name]):
        torch.manual_seed(0)
        states.append(MultiHeadAttention(12, 3, normalization).state_dict())
    shared = [key for key in states[1] if not key.startswith("core.normalization.")]
    assert {"query.weight", "value.weight", "out.weight"} <= set(shared)
    for key in shared:
        assert torch.equal(states[0][key], states[1][key])
