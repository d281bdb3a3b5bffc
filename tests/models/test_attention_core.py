"""The core of attention, alone and in an attention of one's own: what it takes, refuses and shows."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from sinkformer_pl import ops
from sinkformer_pl.diagnostics import attention_of, learned_parameters
from sinkformer_pl.models import AttentionCore, MultiHeadAttention, SetTransformer, TextTransformer, Tokens
from sinkformer_pl.normalizations import LowRankSinkhorn, SemiUnbalancedSinkhorn, Sinkhorn, Softmax, SymmetricSinkhorn
from sinkformer_pl.ops import AttentionMask


def tensors(queries=4, keys=5):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 6), (2, 3, queries, keys))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def test_it_maps_queries_keys_values_mask_and_bias():
    q, k, v, bias = tensors()
    mask = AttentionMask(key=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    core = AttentionCore(3, 8, partial(Sinkhorn, n_iters=5), temperature=0.5).double()
    weights = ops.sinkhorn(q @ k.mT / math.sqrt(8) / 0.5 + bias, 5, mask=mask)
    torch.testing.assert_close(core.weights(q, k, mask, bias), weights)
    torch.testing.assert_close(core(q, k, v, mask, bias), weights @ v)


def test_its_parameters_are_the_temperature_and_the_normalizations_in_this_order():
    core = AttentionCore(3, 8, partial(SemiUnbalancedSinkhorn, learned=True), temperature="learned")
    assert [name for name, _ in core.named_parameters()] == ["log_temperature", "normalization.log_rho"]
    assert set(learned_parameters(core)) == {"temperature", "lam", "log_rho"}
    assert not list(AttentionCore(3, 8, Softmax).parameters())


class Own(nn.Module):
    """An attention of a user: one projection for all, and a core under a name of its own."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 12)
        self.heads = AttentionCore(2, 6, Sinkhorn)

    def forward(self, x, mask=None):
        q = self.project(x).unflatten(-1, (2, 6)).transpose(1, 2)
        return self.heads(q, q, q, mask).transpose(1, 2).flatten(2)


def test_an_attention_of_ones_own_is_seen():
    torch.manual_seed(0)
    own, x = Own(), torch.randn(2, 5, 6)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    [seen] = attention_of(own, x, AttentionMask(real, real))
    assert seen.name == "heads"
    assert seen.core is own.heads
    assert seen.of_sample(1).shape == (2, 3, 3)
    torch.testing.assert_close(seen.of_sample(1).sum(-1), torch.ones(2, 3))


def test_what_a_bias_forbids_is_no_key_of_the_sample_for_the_measures_either():
    q, k, v, _ = tensors()
    bias = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    bias[1, ..., 3:] = torch.finfo(torch.float32).min
    core = AttentionCore(3, 8, partial(Sinkhorn, n_iters=51)).double()
    [seen] = attention_of(core, q, k, v, None, bias)
    assert seen.mask.key.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert ops.marginal_error(seen.weights, seen.mask).max() < 1e-6


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((0, 8, Softmax), ValueError, "num_heads must be at least 1, got 0"),
        ((2, 0, Softmax), ValueError, "head_dim must be at least 1, got 0"),
        ((2, 8, lambda: nn.Module.__new__(nn.Softmax)), TypeError, r"Softmax .* must call super\(\).__init__"),
    ],
)
def test_what_it_cant_be_built_with(given, error, words):
    with pytest.raises(error, match=words):
        AttentionCore(*given)


def texts(**given):
    torch.manual_seed(0)
    arguments = {"vocab_size": 9, "dim": 8, "num_heads": 2, "depth": 1, "dropout": 0.0} | given
    model = TextTransformer(arguments.pop("normalization", Softmax), **arguments).double().eval()
    if model.relative is not None:
        nn.init.normal_(model.relative.table)
    return model


def test_a_causal_text_transformer_looks_back_alone():
    model = texts(causal=True)
    [seen] = attention_of(model, torch.tensor([[1, 2, 3, 4]]))
    assert seen.weights.triu(1).abs().max() == 0
    with pytest.raises(NotImplementedError, match="Sinkhorn can't be causal"):
        texts(causal=True, normalization=Sinkhorn)
    with pytest.raises(ValueError, match="class token comes first"):
        texts(causal=True, pooling="cls")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn])
def test_relative_positions_are_of_the_real_tokens_on_whichever_side_the_padding_is(normalization, pooling):
    model = texts(positions="relative", normalization=normalization, pooling=pooling, depth=2)
    text = torch.tensor([[3, 1, 4, 1, 5]])
    alone = model(text)
    assert (model(text.flip(1)) - alone).abs().max() > 1e-3
    for start in (0, 2):
        padded, mask = torch.full((1, 7), 2), torch.zeros(1, 7, dtype=torch.bool)
        padded[:, start : start + 5], mask[:, start : start + 5] = text, True
        torch.testing.assert_close(model(padded, mask), alone)


def test_relative_positions_are_a_number_for_each_distance():
    model = texts(positions="relative", dim=4, num_heads=1)
    [plain], [seen] = (
        attention_of(m, torch.zeros(1, 100, dtype=torch.int64)) for m in (texts(positions="none"), model)
    )
    assert plain.weights.std() < 1e-12
    logits = seen.weights[0, 0].log()
    table = model.relative.table[0]
    for i, j in ((0, 1), (5, 3), (80, 2), (2, 90)):
        wanted = table[max(-64, min(64, j - i)) + 64] - table[64]
        torch.testing.assert_close(logits[i, j] - logits[i, i], wanted)


@pytest.mark.parametrize("normalization", [LowRankSinkhorn, SymmetricSinkhorn])
def test_relative_positions_are_refused_where_no_bias_is_taken(normalization):
    with pytest.raises(NotImplementedError, match=f"{normalization.__name__} takes no bias"):
        texts(positions="relative", normalization=normalization)


def test_a_backbone_says_what_its_tokens_are():
    mask = torch.tensor([[True, True, False], [True] * 3])
    assert [len(t.points) for t in SetTransformer(Softmax, dim=8).describe_tokens(torch.randn(2, 3, 3), mask)] == [2, 3]
    found = texts(pooling="cls").describe_tokens(torch.tensor([[1, 2, 3], [4, 5, 6]]), mask)
    assert [(t.size, t.leading, t.numbers.tolist()) for t in found] == [(3, 1, [1, 2]), (4, 1, [4, 5, 6])]
    assert isinstance(found[0], Tokens)


def test_a_layer_of_its_own_names_its_sides():
    model = SetTransformer(Softmax, dim=8, num_heads=2, depth=1, inducing_points=4)
    found = attention_of(model, torch.randn(2, 5, 3))
    assert [layer.core.sides for layer in found] == [
        ("inducing point", "token"),
        ("token", "inducing point"),
        ("seed", "token"),
    ]
    assert MultiHeadAttention(8, 2, Softmax).core.sides == ("token", "token")
