"""Softmax under a mask, and its relatives, against formulas in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkformer_pl.ops import AttentionMask, causal_pairs, softmax
from sinkformer_pl.ops.softmax import scalable_softmax, softpick

QUERY = torch.tensor([[True, False, True], [True, True, True]])
KEY = torch.tensor([[True, False, True, True], [False, True, True, False]])
PAIRS = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.3
PAIRS[1, 1, 2] = False
MASKS = {
    "none": AttentionMask(),
    "padding": AttentionMask(QUERY, KEY),
    "no key": AttentionMask(key=torch.tensor([[True] * 4, [False] * 4])),
    "one key": AttentionMask(key=torch.tensor([[True] * 4, [False, True, False, False]])),
    "causal": AttentionMask(pairs=causal_pairs(3, 4)),
    "causal and padding": AttentionMask(QUERY, KEY, causal_pairs(3, 4)),
    "pairs": AttentionMask(QUERY, KEY, PAIRS),
}


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


# --- relatives: each row by a formula in numpy, over the keys that its query meets


def np_softmax1(x):
    return np.exp(x) / (1 + np.exp(x).sum())


def np_scalable(x, s):
    powers = float(len(x)) ** (s * x)  # n^(s x), as the paper writes it
    return powers / powers.sum()


def np_softpick(x):
    e = np.expm1(x)
    return np.maximum(e, 0) / (np.abs(e).sum() + 1e-6)


def by_rows(formula, scores, mask):
    """The formula of each row's allowed scores, 0 elsewhere; `formula(row, head)`."""
    allowed = mask.allowed(scores).expand_as(scores).numpy()
    x, weights = scores.detach().double().numpy(), np.zeros(scores.shape)
    for at in np.ndindex(*scores.shape[:-1]):
        if allowed[at].any():
            weights[at][allowed[at]] = formula(x[at][allowed[at]], at[1])
    return torch.from_numpy(weights)


S = torch.tensor([0.3, 1.7], dtype=torch.float64)
RELATIVES = {
    "sink": (lambda scores, mask: softmax(scores, mask=mask, sink=True), lambda x, head: np_softmax1(x)),
    "scalable": (lambda scores, mask: scalable_softmax(scores, S, mask=mask), lambda x, h: np_scalable(x, float(S[h]))),
    "softpick": (lambda scores, mask: softpick(scores, mask=mask), lambda x, head: np_softpick(x)),
}


@pytest.mark.parametrize("filler", [0.0, 1e30, -1e30])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_against_numpy(name, kind, filler):
    function, formula = RELATIVES[name]
    mask, scores = MASKS[kind], 2 * draw(2, 2, 3, 4)
    allowed = mask.allowed(scores).expand_as(scores)
    filled = scores.where(allowed, filler).requires_grad_()
    weights = function(filled, mask)
    torch.testing.assert_close(weights, by_rows(formula, scores, mask), rtol=1e-12, atol=1e-14)
    assert not weights[~allowed].any()
    weights.square().sum().backward()
    assert filled.grad is not None
    assert filled.grad.isfinite().all()
    assert not filled.grad[~allowed].any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", RELATIVES)
def test_gradients_of_relatives(name, kind):
    function, _ = RELATIVES[name]
    scores = draw(2, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, MASKS[kind]), (scores,), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RELATIVES)
def test_lower_precision_of_relatives(name, dtype):
    """Rounded once, under autocast too; scores and weights of any size."""
    function, formula = RELATIVES[name]
    scores = (5 * draw(2, 2, 5, 300)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        weights = function(scores, AttentionMask())
    assert weights.dtype == dtype
    wanted = by_rows(formula, scores, AttentionMask())
    smallest = torch.finfo(dtype).tiny if dtype != torch.float16 else 1e-7
    tolerance = 3e-5 if dtype == torch.float32 else torch.finfo(dtype).eps  # float32 rounds exponents of up to 100
    torch.testing.assert_close(weights.double(), wanted, rtol=tolerance, atol=smallest)


@pytest.mark.parametrize("offset", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_scores_of_any_size_stay_finite(name, offset):
    function, _ = RELATIVES[name]
    spread = torch.linspace(-1e4, 1e4, 9)
    for scores in (spread + offset, spread / 1e3 + offset, torch.full((9,), offset), torch.full((9,), 1e-30 * offset)):
        x = scores.expand(1, 2, 1, 9).clone().requires_grad_()
        weights = function(x, AttentionMask())
        weights.square().sum().backward()
        assert weights.isfinite().all()
        assert (weights.sum(-1) <= 1 + 1e-6).all()
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", MASKS)
def test_a_sink_is_one_more_column_of_zeros(kind):
    scores = draw(2, 2, 3, 4).requires_grad_()
    masked = scores.where(MASKS[kind].allowed(scores), -math.inf)
    wanted = torch.cat([masked, torch.zeros(2, 2, 3, 1)], -1).softmax(-1)[..., :-1]
    found = softmax(scores, mask=MASKS[kind], sink=True)
    if MASKS[kind].query is not None:
        found, wanted = (x.where(QUERY[:, None, :, None], 0.0) for x in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    upstream = draw(2, 2, 3, 4)
    grads = [torch.autograd.grad(x, scores, upstream, retain_graph=True)[0] for x in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_a_sink_lets_a_query_attend_to_nothing_or_to_everything():
    scores = torch.tensor([[-1e4, -1e4], [0.0, 0.0], [1e4, 1e4]])[None, None]
    sums = softmax(scores, sink=True).sum(-1)
    torch.testing.assert_close(sums, torch.tensor([[[0.0, 2 / 3, 1.0]]]))


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("none", torch.tensor(4).expand(2, 2, 3, 1)),
        ("padding", torch.tensor([3, 2]).reshape(2, 1, 1, 1).expand(2, 2, 3, 1)),
        ("no key", torch.tensor([4, 1]).reshape(2, 1, 1, 1).expand(2, 2, 3, 1)),
        ("causal", torch.tensor([1, 2, 3]).reshape(1, 1, 3, 1).expand(2, 2, 3, 1)),
        ("causal and padding", torch.tensor([[1, 1, 2], [1, 1, 2]]).reshape(2, 1, 3, 1).expand(2, 2, 3, 1)),
    ],
)
def test_numbers_of_keys(kind, counts):
    found = MASKS[kind].num_keys(torch.zeros(2, 2, 3, 4, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.expand(2, 2, 3, 1).equal(counts.float())


def test_scalable_softmax_of_many_keys_doesnt_flatten():
    largest = {}
    for n in (10, 10_000):
        scores = torch.zeros(1, 1, 1, n, dtype=torch.float64)
        scores[..., 0] = 5.0
        largest[n] = float(scalable_softmax(scores, 0.43)[..., 0]), float(softmax(scores)[..., 0])
        assert largest[n][0] == pytest.approx(n**2.15 / (n**2.15 + n - 1))
    assert largest[10_000][0] > largest[10][0] > 0.9
    assert largest[10_000][1] < 0.02


def test_softpick_near_zero_doesnt_cancel():
    """e^(x-m) - e^-m, computed as it is written, would lose all digits of these float32 scores."""
    scores = torch.tensor([3e-9, -5e-9, 2e-7, 1e-6, -4e-6, 0.0])[None, None, None]
    for shift in (0.0, 4.0):
        row = torch.cat([scores, torch.full((1, 1, 1, 1), shift)], -1)
        wanted = by_rows(RELATIVES["softpick"][1], row, AttentionMask())
        torch.testing.assert_close(softpick(row).double(), wanted, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6))
def test_softpick_has_rows_of_positive_over_all(row):
    scores = torch.tensor(row, dtype=torch.float64)[None]
    weights = softpick(scores)
    assert (weights >= 0).all()
    assert weights[scores <= 0].sum() == 0
    if max(row) > 1e-3:
        # log of sum over positive x of (e^x - 1), and over negative x of (1 - e^x)
        positive = torch.logsumexp(scores + (-(-scores.relu()).expm1()).log(), -1)
        negative = (-(-F.relu(-scores)).expm1()).sum(-1)
        wanted = 1 / (1 + (negative + 1e-6) * (-positive).exp())
        torch.testing.assert_close(weights.sum(-1), wanted)


@pytest.mark.parametrize("name", RELATIVES)
def test_no_keys_at_all(name):
    function, _ = RELATIVES[name]
    assert function(draw(2, 2, 3, 0), AttentionMask()).shape == (2, 2, 3, 0)
