"""The SlicedTransport class over its function."""

from typing import Any

import pytest
import torch

from sinkformer_pl import ops
from sinkformer_pl.models import MultiHeadAttention
from sinkformer_pl.normalizations.sliced_transport import SlicedTransport
from sinkformer_pl.ops import AttentionMask
from sinkformer_pl.ops.sliced_transport import sliced_transport

MASK = AttentionMask(torch.arange(6).expand(2, -1) < 4, torch.arange(6).expand(2, -1) > 1)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 6, width, generator=generator, dtype=torch.float64) for width in (8, 8, 4)]


def built(*arguments: Any, **options: Any) -> SlicedTransport:
    module = SlicedTransport(*arguments, **options)
    module.build(num_heads=3, head_dim=8)
    return module.double()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("arguments", [(), (0.3, 0.5), (0, 2.0), (0.1, 1.0, 5)], ids=str)
def test_it_is_the_function(arguments, mask):
    q, k, v = inputs()
    module = built(*arguments)
    sort, slices = (*arguments, *(0.01, 1.0)[len(arguments) :])[:2]
    scale = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    wanted = sliced_transport(
        q, k, v, sort_temperature=sort, slice_temperature=slices, scale=scale, directions=module.directions, mask=mask
    )
    torch.testing.assert_close(module.attend(q, k, v, mask, scale=scale), wanted)
    torch.testing.assert_close(module.weights(q, k, mask, scale=scale) @ v, wanted)


def test_hard_ranks_promise_exact_sums_at_a_linear_cost():
    q, k, _ = inputs()
    soft, hard = SlicedTransport().promises, SlicedTransport(0).promises
    assert (soft.row_sums, soft.linear) == (None, False)
    assert (hard.row_sums, hard.linear) == ("one", True)
    assert ops.marginal_error(SlicedTransport(0).weights(q, k, MASK, scale=1.0), MASK).max() < 1e-14
    assert 1e-4 < ops.marginal_error(SlicedTransport().weights(q, k, MASK, scale=1.0), MASK).max() < 0.3


def test_directions_are_learned_for_each_head():
    q, k, v = inputs()
    module = built(0.5, slices=5)
    assert {name: x.shape for name, x in module.named_parameters()} == {"directions": (3, 5, 8)}
    module.attend(q, k, v, MASK, scale=0.3).sin().sum().backward()
    assert (module.directions.grad.abs().amax((1, 2)) > 1e-6).all()
    assert not list(built().parameters())


def test_without_build_learned_directions_are_missed():
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match=r"directions .* call its build\(num_heads, head_dim\)"):
        SlicedTransport(slices=2).attend(q, k, v, None, scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sort_temperature": -1}, "SlicedTransport: sort_temperature must be finite and at least 0 .* got -1"),
        ({"slice_temperature": 0}, "SlicedTransport: slice_temperature must be finite and above 0, got 0"),
        ({"slices": 0}, "slices must be None or an integer of at least 1, got 0"),
        ({"slices": True}, "slices must be None or an integer"),
        ({"slices": 2.0}, "slices must be None or an integer"),
        ({"slices": 2, "sort_temperature": 0.0}, "slices are learned through soft ranks"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, words):
    with pytest.raises(ValueError, match=words):
        SlicedTransport(**arguments)


def test_what_it_cant_honour_is_refused():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="takes no bias: it forms no scores"):
        SlicedTransport().attend(q, k, v, None, scale=1.0, bias=torch.zeros(6, 6))
    with pytest.raises(NotImplementedError, match="takes no bias: it forms no scores"):
        SlicedTransport().weights(q, k, None, scale=1.0, bias=torch.zeros(6, 6))
    with pytest.raises(NotImplementedError, match="SlicedTransport can't be causal"):
        MultiHeadAttention(8, 2, SlicedTransport, causal=True)


def test_it_says_what_it_is():
    assert "SlicedTransport(sort_temperature=0.1, slice_temperature=2.0, slices=3)" in repr(
        SlicedTransport(0.1, 2.0, 3)
    )
