"""The weights of each layer, as the layer itself would use them, and nothing else changed."""

from functools import partial

import pytest
import torch

from sinkformer_pl.diagnostics import attention_of, learned_parameters
from sinkformer_pl.models import MultiHeadAttention, PointCloudTransformer, SetTransformer, TextTransformer
from sinkformer_pl.normalizations import Entmax, ScalableSoftmax, SemiUnbalancedSinkhorn, Sinkhorn, Softmax


def sets():
    torch.manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 6])[:, None]
    return torch.randn(2, 9, 3), mask


def test_weights_times_values_are_what_the_layer_gives():
    model = SetTransformer(partial(Sinkhorn, n_iters=3), dim=8, num_heads=2, depth=1, inducing_points=4).eval()
    inputs, mask = sets()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            module.register_forward_hook(
                lambda layer, args, out, name=name: seen.update({name: ((layer, args[1]), out)})
            )
    found = attention_of(model, inputs, mask)
    assert [layer.name for layer in found] == [
        "blocks.0.gather.attention",
        "blocks.0.scatter.attention",
        "pool.block.attention",
    ]
    assert [tuple(layer.weights.shape) for layer in found] == [(2, 2, 4, 9), (2, 2, 9, 4), (2, 2, 1, 9)]
    for attention in found:
        (layer, keys), out = seen[attention.name]
        attended = attention.weights @ layer.value(keys).unflatten(-1, (2, -1)).transpose(1, 2)
        torch.testing.assert_close(layer.out(attended.transpose(1, 2).flatten(2)), out)
    assert found[0].of_sample(1).shape == (2, 4, 6)
    assert found[1].of_sample(1).shape == (2, 6, 4)


def test_modes_and_hooks_are_as_before_even_after_an_error():
    model = SetTransformer(Softmax, dim=8, num_heads=2, dropout=0.5).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    attention_of(model, *sets())
    with pytest.raises(ValueError, match="features"):
        attention_of(model, torch.randn(2, 9, 5))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_shared_attention_and_texts():
    points = PointCloudTransformer(Softmax, dim=16, depth=2, centres=(6,), neighbours=3, fused_dim=8, head_dims=(4,))
    found = attention_of(points, *sets())
    assert [tuple(layer.weights.shape) for layer in found] == [(2, 1, 6, 6)] * 2
    text = TextTransformer(Softmax, vocab_size=20, dim=8, num_heads=2, depth=1, pooling="cls")
    [layer] = attention_of(
        text, torch.ones(2, 4, dtype=torch.int64), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    )
    assert layer.of_sample(1).shape == (2, 3, 3)
    torch.testing.assert_close(layer.of_sample(1).sum(-1), torch.ones(2, 3))


def test_a_causal_layer_says_which_pairs_may_meet():
    layer = MultiHeadAttention(8, 2, Softmax, causal=True)
    x = torch.randn(1, 3, 8)
    [found] = attention_of(torch.nn.Sequential(layer)[0], x, x)
    assert torch.equal(found.mask.pairs[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())
    assert found.name == ""


def test_a_compiled_network_is_not_compiled_anew():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = TextTransformer(Softmax, vocab_size=20, dim=8, num_heads=2, depth=2)
    plain = attention_of(model, torch.arange(6)[None])
    model.compile(backend=backend)
    model(torch.arange(6)[None])
    before = len(graphs)
    compiled = attention_of(model, torch.arange(5)[None])
    assert [layer.name for layer in compiled] == [layer.name for layer in plain]
    assert len(graphs) == before > 0


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        (Softmax, {}),
        (partial(ScalableSoftmax, s=0.5, learned=True), {"s": 0.5}),
        (partial(Entmax, alpha=1.25, learned=True), {"alpha": 1.25}),
        (partial(Entmax, alpha=1.25), {}),
        (partial(SemiUnbalancedSinkhorn, rho=3.0, learned=True), {"lam": 0.75}),
    ],
)
def test_learned_parameters(normalization, expected):
    found = learned_parameters(MultiHeadAttention(8, 2, normalization).core)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.full((2,), value))
    assert bool(found) == bool(expected)


def test_a_learned_temperature():
    layer = MultiHeadAttention(8, 2, Softmax, temperature="learned")
    with torch.no_grad():
        layer.core.log_temperature[1] = 1.0
    torch.testing.assert_close(learned_parameters(layer.core)["temperature"], torch.tensor([0.0, 1.0]).exp())
