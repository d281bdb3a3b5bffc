"""The LowRankSinkhorn class over its function."""

from typing import Any

import pytest
import torch

from sinkformer_pl.models import MultiHeadAttention
from sinkformer_pl.normalizations.low_rank_sinkhorn import LowRankSinkhorn
from sinkformer_pl.ops import AttentionMask, marginal_error
from sinkformer_pl.ops.low_rank_sinkhorn import low_rank_sinkhorn

MASK = AttentionMask(torch.arange(5).expand(2, -1) < 4, torch.arange(6).expand(2, -1) > 1)


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def built(**options: Any) -> LowRankSinkhorn:
    module = LowRankSinkhorn(**options)
    module.build(num_heads=3, head_dim=8)
    torch.nn.init.normal_(module.mass_logits, generator=torch.Generator().manual_seed(1))
    return module.double()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("options", [{}, {"rank": 3, "n_iters": 3}], ids=str)
def test_it_is_the_function(options, mask):
    q, k, v = inputs()
    module, scale = built(**options), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    masses = module.mass_logits.softmax(-1)
    plan = low_rank_sinkhorn(q, k, module.pivots, masses, options.get("n_iters", 5), scale=scale, mask=mask)
    assert plan.to_pivots.shape == (2, 3, 5, options.get("rank", 16))
    torch.testing.assert_close(module.attend(q, k, v, mask, scale=scale), plan.to_pivots @ plan.to_keys @ v)
    torch.testing.assert_close(module.weights(q, k, mask, scale=scale), plan.to_pivots @ plan.to_keys)


def test_pivots_and_masses_of_each_head_are_learned():
    q, k, v = inputs()
    module = built(rank=4, n_iters=3)
    assert {name: x.shape for name, x in module.named_parameters()} == {"pivots": (3, 4, 8), "mass_logits": (3, 4)}
    module.attend(q, k, v, MASK, scale=0.3).sin().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1).abs().amax(1) > 1e-4).all()


def test_masses_start_equal_and_pivots_differ():
    module = LowRankSinkhorn(rank=4)
    module.build(num_heads=2, head_dim=8)
    assert not module.mass_logits.any()
    assert torch.cdist(module.pivots.flatten(0, 1), module.pivots.flatten(0, 1)).fill_diagonal_(1).min() > 0.1


def test_many_half_steps_are_doubly_stochastic():
    q, k, _ = inputs()
    assert marginal_error(built(n_iters=301).weights(q, k, MASK, scale=1.0), MASK).max() < 1e-9


def test_padded_values_count_for_nothing():
    q, k, v = inputs()
    assert MASK.key is not None
    module, filled = built(), v.where(MASK.key[:, None, :, None], 1e30)
    torch.testing.assert_close(module.attend(q, k, filled, MASK, scale=1.0), module.attend(q, k, v, MASK, scale=1.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"rank": rank}, f"rank must be an integer of at least 2, got {rank!r}") for rank in (0, 1, True, 4.0)),
        *(({"n_iters": n}, f"use an odd number of at least 3, got {n!r}") for n in (0, 1, 2, 4, True, 3.0)),
    ],
)
def test_arguments_out_of_range_are_refused(options: Any, words):
    with pytest.raises(ValueError, match=f"LowRankSinkhorn: .*{words}"):
        LowRankSinkhorn(**options)


def test_what_it_cant_honour_is_refused():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="never forms the scores"):
        built().attend(q, k, v, None, scale=1.0, bias=torch.zeros(5, 6))
    with pytest.raises(NotImplementedError, match="never forms the scores"):
        built().weights(q, k, None, scale=1.0, bias=torch.zeros(5, 6))
    with pytest.raises(NotImplementedError, match="LowRankSinkhorn can't be causal"):
        MultiHeadAttention(8, 2, LowRankSinkhorn, causal=True)


def test_it_says_what_it_is():
    assert repr(LowRankSinkhorn(rank=8, n_iters=7)) == "LowRankSinkhorn(rank=8, n_iters=7)"
