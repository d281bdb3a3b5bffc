"""Numbers that are fixed, or learned for each head: one way in all members."""

import copy
import inspect
import math
import pickle

import pytest
import torch

from sinkformer_pl.normalizations import (
    Blend,
    Entmax,
    LowRankSinkhorn,
    ScalableSoftmax,
    SemiUnbalancedSinkhorn,
    registered,
)
from sinkformer_pl.normalizations.per_head import numbers_per_head

MEMBERS = [cls for cls in registered().values() if "learned" in inspect.signature(cls).parameters]


def made(cls, **arguments):
    """Make a member with a number that can be learned."""
    return cls(**({"share": 0.5} if cls is Blend else {}), **arguments)


def test_the_members_with_one():
    assert set(MEMBERS) == {Blend, Entmax, ScalableSoftmax, SemiUnbalancedSinkhorn}
    assert all(any(numbers_per_head(cls)) for cls in MEMBERS)
    assert {inspect.signature(cls).parameters["learned"].default for cls in MEMBERS} == {False}


@pytest.mark.parametrize("cls", MEMBERS)
def test_a_learned_one_starts_where_the_fixed_one_is(cls):
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    fixed, learned = made(cls), made(cls, learned=True)
    learned.build(3, 8)
    [(name, parameter)] = learned.named_parameters()
    assert parameter.shape == (3,)
    assert not list(fixed.parameters())
    torch.testing.assert_close(learned.weights(q, k), fixed.weights(q, k))
    learned.attend(q, k, k).square().sum().backward()
    assert parameter.grad.abs().min() > 0, name
    for copied in (copy.deepcopy(learned), pickle.loads(pickle.dumps(learned))):
        assert copied.weights(q, k).equal(learned.weights(q, k))


@pytest.mark.parametrize("method", ["attend", "weights"])
@pytest.mark.parametrize("cls", [*MEMBERS, LowRankSinkhorn])
def test_without_build_it_says_so(cls, method):
    q = torch.randn(2, 3, 4, 8)
    module = cls() if cls is LowRankSinkhorn else made(cls, learned=True)
    with pytest.raises(RuntimeError, match=rf"{cls.__name__} has no \w+ yet.* call its build\(num_heads, head_dim\)"):
        getattr(module, method)(*(q, q, q)[: 3 if method == "attend" else 2])


@pytest.mark.parametrize("cls", MEMBERS)
def test_learned_is_a_bool(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: learned must be True or False, got 'no'"):
        made(cls, learned="no")


@pytest.mark.parametrize("name", list(registered()))
def test_attend_and_weights_have_the_scale_of_attention_by_default(name):
    torch.manual_seed(0)
    module, q, v = registered()[name](), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 6)
    module.build(3, 8)
    module.eval()
    scale = 1 / math.sqrt(8)
    assert module.weights(q, q).equal(module.weights(q, q, None, scale=scale))
    torch.testing.assert_close(module.attend(q, q, v), module.attend(q, q, v, None, scale=scale))
    with pytest.raises(TypeError, match="scael"):
        module.attend(q, q, v, None, scael=2.0)
    with pytest.raises(TypeError, match="scael"):
        module.weights(q, q, None, scael=2.0)
