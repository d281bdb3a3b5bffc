"""Masks and options of other libraries."""

import pytest
import torch
from torch import Tensor

from sinkformer_pl.conversion import ConvertedCore, attend
from sinkformer_pl.normalizations import Sinkhorn, SlicedTransport, Softmax
from sinkformer_pl.ops import AttentionMask

Q, K, V = (torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
REAL = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()


def core(normalization: type = Sinkhorn, **options: object) -> ConvertedCore:
    return ConvertedCore(4, 3, normalization, layer="blocks.3.attention", **options).eval()


def additive(allowed: Tensor, lowest: float = -torch.inf, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)


PAIRS = REAL[:, None, :, None] & REAL[:, None, None]
PADDING = {
    "keys": {"keys": REAL},
    "bool": {"mask": REAL[:, None, None]},
    "float": {"mask": additive(REAL)[:, None, None]},
    "least number": {"mask": additive(REAL, torch.finfo(torch.float32).min)[:, None, None]},
    "least number of half precision": {
        "mask": additive(REAL, torch.finfo(torch.float16).min, torch.float16)[:, None, None]
    },
    "bias": {"bias": additive(REAL)[:, None, None]},
    "pairs": {"mask": PAIRS},
    "pairs as float": {"mask": additive(PAIRS)},
    "rows of padding may see": {"mask": REAL[:, None, None].expand(2, 1, 6, 6)},
    "in two masks": {"keys": REAL | REAL.roll(1, 0), "mask": REAL[:, None, None]},
    "one of two masks": {"keys": REAL, "bias": torch.zeros(1, 1, 1, 6)},
}


@pytest.mark.parametrize("form", PADDING)
@pytest.mark.parametrize("normalization", [Sinkhorn, Softmax, SlicedTransport])
def test_padding_in_any_form_is_the_mask_of_real_tokens(normalization, form):
    wanted = core(normalization)(Q, K, V, AttentionMask(REAL, REAL))
    output = attend(core(normalization), Q, K, V, **PADDING[form])
    rows = REAL[:, None].expand(2, 4, 6)
    torch.testing.assert_close(output[rows], wanted[rows], atol=1e-6, rtol=1e-5)


def test_queries_of_another_sequence_are_real_unless_said_otherwise():
    rows = {"mask": REAL[:, None, None].expand(2, 1, 6, 6), "self_attention": False}
    torch.testing.assert_close(attend(core(), Q, K, V, **rows), core()(Q, K, V, AttentionMask(None, REAL)))
    others = REAL.flip(0)
    wanted = core()(Q, K, V, AttentionMask(others, REAL))
    torch.testing.assert_close(attend(core(), Q, K, V, **rows, queries=others), wanted)


def test_a_bias_is_added_and_what_it_forbids_leaves():
    numbers = torch.randn(1, 4, 6, 6)
    wanted = core()(Q, K, V, AttentionMask(REAL, REAL), numbers)
    for given in (
        {"bias": numbers, "keys": REAL},
        {"mask": numbers + additive(REAL)[:, None, None], "queries": REAL},
        {"bias": numbers, "mask": additive(PAIRS)},
    ):
        torch.testing.assert_close(attend(core(), Q, K, V, **given), wanted)
    learned = torch.zeros(4, 6, 6, requires_grad=True)
    attend(core(), Q, K, V, bias=learned, keys=REAL).square().sum().backward()
    assert learned.grad.abs().max() > 0


def test_few_heads_of_keys_are_repeated_for_their_queries():
    wanted = core()(Q, K[:, [0, 0, 1, 1]], V[:, [0, 0, 1, 1]])
    assert torch.equal(attend(core(), Q, K[:, :2], V[:, :2]), wanted)


def test_causality_is_honoured_or_refused_with_the_layer_and_what_is_possible():
    pairs = torch.ones(6, 6).tril().bool()
    wanted = core(Softmax)(Q, K, V, AttentionMask(pairs=pairs[None, None]))
    assert torch.equal(attend(core(Softmax), Q, K, V, causal=True), wanted)
    for given in ({"causal": True}, {"mask": pairs}, {"mask": additive(pairs)}):
        with pytest.raises(NotImplementedError, match=r"blocks\.3\.attention: Sinkhorn .*layers=.*Softmax"):
            attend(core(), Q, K, V, **given)


def test_a_scale_of_the_library_takes_the_place_of_the_usual_one():
    torch.testing.assert_close(attend(core(scale=1.0), Q, K, V), core()(Q * 3**0.5, K, V))
