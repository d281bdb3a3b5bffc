"""Sparsemax, Entmax15 and Entmax: the classes over their functions, and alphas that are learned."""

from typing import Any

import pytest
import torch

from sinkformer_pl.models.multi_head_attention import MultiHeadAttention
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.normalizations.entmax import Entmax
from sinkformer_pl.normalizations.entmax15 import Entmax15
from sinkformer_pl.normalizations.sparsemax import Sparsemax
from sinkformer_pl.ops import AttentionMask, causal_pairs
from sinkformer_pl.ops.entmax import entmax, entmax15, sparsemax

MASK = AttentionMask(
    torch.arange(5).expand(2, -1) < 4, torch.arange(6).expand(2, -1) > 0, pairs=causal_pairs(5, 6).roll(1, -1)
)


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4), (2, 3, 5, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def learned(alpha=1.5):
    module = Entmax(alpha, learned=True)
    module.build(num_heads=3, head_dim=8)
    return module


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (Sparsemax(), sparsemax),
        (Entmax15(), entmax15),
        (Entmax(), entmax15),
        (Entmax(2), sparsemax),
        (Entmax(1.2), lambda scores, mask: entmax(scores, 1.2, mask=mask)),
        (learned(1.8), lambda scores, mask: entmax(scores, torch.full((3,), 1.8), mask=mask)),
    ],
)
def test_weights_are_those_of_the_function(module, function, mask):
    q, k, v, bias = inputs()
    scale = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    wanted = function(torch.einsum("bhqd,bhkd,h->bhqk", q, k, scale) + bias, mask=mask)
    assert (wanted == 0).any()
    for result, right in (
        (module.weights(q, k, mask, scale=scale, bias=bias), wanted),
        (module.attend(q, k, v, mask, scale=scale, bias=bias), wanted @ v),
    ):
        torch.testing.assert_close(result, right, rtol=1e-6, atol=1e-6)


def test_close_to_1_it_is_close_to_softmax():
    q, k, v, _ = inputs()
    found, wanted = (module.attend(q, k, v, MASK, scale=0.5) for module in (Entmax(1 + 1e-7), Softmax()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0001, 1.1, 1.5, 1.95])
def test_a_learned_alpha_starts_where_it_is_told(alpha):
    torch.testing.assert_close(learned(alpha).alpha, torch.full((3,), alpha))


def test_each_head_learns_its_own_alpha():
    """Heads that imitate sparsemax and softmax move towards them."""
    module, (q, k, v, _) = learned(), (x.float() for x in inputs())
    targets = [c.attend(q, k, v, None, scale=0.3).detach() for c in (Sparsemax(), Softmax())]
    wanted = torch.stack(
        (targets[0][:, 0], targets[1][:, 1], module.attend(q, k, v, None, scale=0.3)[:, 2].detach()), 1
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (module.attend(q, k, v, None, scale=0.3) - wanted).square().sum().backward()
        optimizer.step()
    sparse, dense, same = module.alpha.tolist()
    assert sparse > 1.8
    assert dense < 1.2
    assert abs(same - 1.5) < 0.05


@pytest.mark.parametrize("logit", [-1e3, -20.0, 20.0, 1e3])
def test_alpha_never_leaves_1_to_2(logit):
    q, k, v, _ = (x.float() for x in inputs())
    module = learned()
    torch.nn.init.constant_(module.alpha_logit, logit)
    assert ((module.alpha >= 1) & (module.alpha <= 2)).all()
    limit = Softmax() if logit < 0 else Sparsemax()
    output = module.attend(q, k, v, MASK, scale=0.5)
    torch.testing.assert_close(output, limit.attend(q, k, v, MASK, scale=0.5))
    output.sum().backward()
    assert module.alpha_logit.grad.isfinite().all()


def test_a_module_in_half_precision_computes_alpha_in_single():
    assert learned().to(torch.bfloat16).alpha.dtype == torch.float32


def test_parameters_of_an_attention_layer():
    layer = MultiHeadAttention(8, 2, lambda: Entmax(1.3, learned=True), causal=True)
    assert layer.core.normalization.alpha_logit.shape == (2,)
    assert not list(MultiHeadAttention(8, 2, Entmax).core.normalization.parameters())


def test_shown_with_arguments():
    assert repr(Entmax(1.25)) == "Entmax(alpha=1.25, learned=False)"
    assert repr(learned()) == "Entmax(alpha=1.5, learned=True)"


@pytest.mark.parametrize("alpha", [1, 1.0, 0.5, -1, 2.01, float("nan"), float("inf"), True, "1.5", None])
@pytest.mark.parametrize("learned", [False, True])
def test_alpha_out_of_range_is_refused(alpha: Any, learned):
    with pytest.raises(ValueError, match=rf"Entmax: alpha must be in \(1, 2.*, got {alpha!r}"):
        Entmax(alpha, learned=learned)


def test_a_learned_alpha_cant_start_at_its_bound():
    with pytest.raises(ValueError, match=r"alpha must be in \(1, 2\), since it is learned, got 2"):
        Entmax(2, learned=True)
