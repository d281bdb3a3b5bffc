"""Softmax under a mask."""

import pytest
import torch

from sinkformer_pl.ops import AttentionMask, causal_pairs, softmax


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_a_mask_it_is_torch_softmax(dtype):
    scores = 10 * draw(2, 2, 5, 7, dtype=dtype)
    torch.testing.assert_close(softmax(scores), scores.softmax(-1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    scores = (10 * draw(2, 2, 5, 700)).to(dtype)
    weights = softmax(scores)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, scores.double().softmax(-1).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_autocast_changes_nothing():
    scores = draw(2, 2, 5, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        weights = softmax(scores)
    assert weights.dtype == torch.bfloat16
    assert weights.equal(softmax(scores))


@pytest.mark.parametrize("filler", [0.0, 1e30, -1e30])
def test_masked_entries_are_zero_whatever_they_hold(filler):
    mask = AttentionMask(
        torch.tensor([[True, False, True], [True, True, True]]),
        torch.tensor([[True, False, True, True], [False, True, True, False]]),
        torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.3,
    )
    scores = draw(2, 2, 3, 4)
    allowed = mask.allowed(scores)
    filled = scores.where(allowed, filler).requires_grad_()
    weights = softmax(filled, mask=mask)
    exponentials = scores.exp().where(allowed, 0.0)
    torch.testing.assert_close(weights, exponentials / exponentials.sum(-1, keepdim=True).clamp(min=1e-300))
    assert (weights[~allowed] == 0).all()
    weights.square().sum().backward()
    assert filled.grad is not None
    assert (filled.grad[~allowed] == 0).all()


def test_a_query_without_a_key_is_zero_in_value_and_gradient():
    pairs = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    pairs[..., 1, :] = False
    scores = draw(1, 2, 3, 4).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either, or training in this mode would stop
        weights = softmax(scores, mask=AttentionMask(pairs=pairs))
        weights.square().sum().backward()
    assert scores.grad is not None
    assert not weights[..., 1, :].any()
    assert not scores.grad[..., 1, :].any()
    assert scores.grad.isfinite().all()
    torch.testing.assert_close(weights[..., [0, 2], :], scores[..., [0, 2], :].softmax(-1))


def test_causal_pairs_are_the_lower_triangle():
    weights = softmax(draw(1, 1, 4, 4), mask=AttentionMask(pairs=causal_pairs(4, 4)))
    assert (weights != 0).equal(torch.ones(1, 1, 4, 4).tril() > 0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 4, dtype=torch.float64))


def test_gradcheck():
    mask = AttentionMask(key=torch.tensor([[True, True, False, True], [False] * 4]))
    scores = draw(2, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: softmax(s, mask=mask), (scores,), atol=1e-8, rtol=1e-6)


def test_large_scores_stay_finite():
    scores = (1e4 * draw(1, 2, 8, 9, dtype=torch.float32)).requires_grad_()
    softmax(scores).square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
