"""Blend: between softmax and another normalization."""

import copy
import pickle
from functools import partial

import pytest
import torch

from sinkformer_pl.normalizations import Blend, Entmax15, SemiUnbalancedSinkhorn, Sinkhorn, Sparsemax
from sinkformer_pl.ops import AttentionMask, sinkhorn, softmax
from sinkformer_pl.testing import check_normalization

Q, K, V = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
MASK = AttentionMask(*[torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()] * 2)
SCORES = Q @ K.mT / 2


def built(**arguments):
    blend = Blend(**arguments)
    blend.build(3, 4)
    return blend


@pytest.mark.parametrize(
    "blend",
    [
        partial(Blend, share=0.3),
        partial(Blend, target=partial(SemiUnbalancedSinkhorn, learned=True), share=0.3, learned=True),
        partial(Blend, target=Entmax15, share=0.5),
    ],
)
def test_it_keeps_the_contract(blend):
    check_normalization(blend)


def test_weights_are_those_of_the_two_by_the_share():
    blend = built(share=0.8)
    for done in (0, 0.25, 0.5, 1):
        blend.move(done)
        wanted = softmax(SCORES, mask=MASK).lerp(sinkhorn(SCORES, 3, mask=MASK), 0.8 * done)
        torch.testing.assert_close(blend.weights(Q, K, MASK), wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(blend.attend(Q, K, V, MASK), wanted @ V.where(MASK.key_row(V.mT).mT, 0.0))


def test_at_both_ends_one_is_computed_alone():
    blend = built()
    blend.softmax.attend = None
    assert torch.equal(blend.attend(Q, K, V), Sinkhorn().attend(Q, K, V))
    blend = built()
    blend.move(0)
    blend.target.attend = None
    blend.attend(Q, K, V)


def test_each_head_learns_a_share():
    blend = built(share=0.2, learned=True)
    torch.testing.assert_close(blend.share, torch.full((3,), 0.2))
    blend.attend(Q, K, V).square().sum().backward()
    assert blend.share_logit.grad.abs().min() > 0
    with torch.no_grad():
        blend.share_logit.copy_(torch.tensor([-30.0, 0, 30.0]))
    outputs = blend.attend(Q, K, V)
    torch.testing.assert_close(outputs[:, 2], Sinkhorn().attend(Q, K, V)[:, 2])
    torch.testing.assert_close(outputs[:, 0], blend.softmax.attend(Q, K, V)[:, 0])


@pytest.mark.parametrize("done", [0.0, 0.4, 1.0])
def test_a_state_a_copy_and_a_pickle_have_the_share_that_was_reached(done):
    blend = built()
    blend.move(done)
    other = built()
    other.load_state_dict(blend.state_dict())
    for same in (other, copy.deepcopy(blend), pickle.loads(pickle.dumps(blend))):
        assert torch.equal(same.attend(Q, K, V), blend.attend(Q, K, V))


def test_it_promises_and_requires_what_both_do():
    assert Blend(Sparsemax).promises.sparse
    assert not Blend(Sparsemax, share=0.5).promises.sparse
    assert Blend(Sparsemax, share=0.5).promises.pairs
    assert not Blend().promises.pairs
    assert Blend().promises.unit_columns
    assert not Blend(share=0.5).promises.unit_columns


def test_what_cannot_be_blended_is_refused():
    for share in (0, -0.5, 1.5, True, "half"):
        with pytest.raises(ValueError, match=f"share .*{share!r}"):
            Blend(share=share)
    with pytest.raises(ValueError, match="learned share starts below 1"):
        Blend(learned=True)
    with pytest.raises(TypeError, match="Linear"):
        Blend(partial(torch.nn.Linear, 2, 2))
