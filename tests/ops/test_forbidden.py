"""A bias that forbids: which entries do, which keys leave the sample, and that nothing waits for the values."""

import pytest
import torch

from sinkformer_pl.ops import AttentionMask
from sinkformer_pl.ops.forbidden import forbid, forbid_pairs
from sinkformer_pl.ops.mask import is_forbidden

SCORES = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_usual_additive_masks_forbid_in_every_dtype(dtype):
    values = [-torch.inf, torch.finfo(dtype).min, -1e9, -1e30, -1e4, 0.0, torch.inf, torch.nan]
    expected = torch.tensor([True, True, True, True, False, False, False, False])
    assert is_forbidden(torch.tensor(values, dtype=torch.float64).to(dtype)).equal(expected)


def test_masks_that_went_through_bfloat16_forbid_afterwards():
    assert is_forbidden(torch.tensor([-1e9]).bfloat16().float()).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 1, 5), (1, 1, 4, 5), (4, 5), (5,), (1, 3, 4, 5)])
def test_a_key_that_nobody_may_meet_leaves_the_sample(shape):
    bias = torch.randn(shape)
    bias[..., 1] = torch.finfo(torch.float32).min
    cleaned, mask = forbid(bias, None, SCORES)
    assert mask.key.tolist() == [[True, False, True, True, True]] * 2
    assert mask.query is mask.pairs is None
    assert cleaned.shape == bias.shape
    assert cleaned[..., 1].isneginf().all()
    assert cleaned[..., [0, 2, 3, 4]].equal(bias[..., [0, 2, 3, 4]])


def test_a_key_that_one_real_query_or_head_may_meet_stays():
    bias = torch.zeros(2, 3, 4, 5)
    bias[0, :, :, 0] = -1e9
    bias[0, 2, 3, 0] = 0.0
    bias[1, :2, :, 1] = -1e9
    cleaned, mask = forbid(bias, AttentionMask(), SCORES)
    assert mask.key.all()
    assert cleaned.isneginf().sum() == 11 + 8
    padded = AttentionMask(query=torch.tensor([[True, True, True, False], [True] * 4]))
    assert forbid(bias, padded, SCORES)[1].key.tolist() == [[False, True, True, True, True], [True] * 5]
    assert forbid(bias, padded, SCORES)[1].query is padded.query


def test_padded_keys_stay_padded():
    key = torch.tensor([[True, True, False, True, True], [True] * 5])
    mask = forbid(torch.zeros(1, 1, 4, 5), AttentionMask(key=key), SCORES)[1]
    assert mask.key.equal(key)


def test_without_a_bias_the_mask_stays_as_it_is():
    mask = AttentionMask()
    assert forbid(None, mask, SCORES) == (None, mask)
    assert forbid_pairs(None, mask, SCORES) == (None, mask)
    assert forbid(None, None, SCORES) == (None, AttentionMask())


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_scores_of_any_number_of_axes(leading):
    bias = torch.zeros(4, 5)
    bias[:, 2] = -torch.inf
    _, mask = forbid(bias, None, torch.zeros(*leading, 4, 5))
    assert mask.key.tolist() == [[True, True, False, True, True]] * (2 if leading else 1)


def test_pairs_for_what_honours_them():
    bias = torch.randn(3, 4, 5)
    bias[0, 0, 0] = bias[2, 3, 4] = -1e9
    given = torch.ones(1, 1, 4, 5, dtype=torch.bool).tril()
    cleaned, mask = forbid_pairs(bias, AttentionMask(pairs=given), SCORES)
    assert cleaned.isfinite().all()
    assert cleaned[0, 0, 0] == cleaned[2, 3, 4] == 0
    wanted = given.expand(1, 3, 4, 5).clone()
    wanted[0, 0, 0, 0] = wanted[0, 2, 3, 4] = False
    assert mask.pairs.equal(wanted)


@pytest.mark.parametrize("rule", [forbid, forbid_pairs])
def test_a_second_time_changes_nothing(rule):
    bias = torch.zeros(2, 1, 4, 5)
    bias[0, :, :, 1] = bias[1, 0, 2, 2] = -torch.inf
    once = rule(bias, None, SCORES)
    twice = rule(*once, SCORES)
    assert twice[0].equal(once[0])
    assert all(a is b or a.equal(b) for a, b in zip(vars(twice[1]).values(), vars(once[1]).values(), strict=True))


def test_forbidden_entries_get_no_gradient():
    bias = torch.zeros(1, 1, 4, 5)
    bias[..., 1] = -1e9
    bias.requires_grad_()
    cleaned, _ = forbid_pairs(bias, None, SCORES)
    (gradient,) = torch.autograd.grad(cleaned.sum(), bias)
    assert gradient[..., 1].abs().sum() == 0
    assert gradient[..., 0].sum() == 4


def test_no_tokens():
    for shape in ((2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5)):
        cleaned, mask = forbid(torch.zeros(shape), None, torch.zeros(shape))
        assert cleaned.shape == shape
        assert mask.key.shape == (shape[0], shape[-1])


@pytest.mark.parametrize("rule", [forbid, forbid_pairs])
def test_one_graph_without_a_wait(rule):
    def door(bias, query):
        return rule(bias, AttentionMask(query=query), SCORES)[1].key

    bias, query = torch.zeros(2, 1, 4, 5), torch.ones(2, 4, dtype=torch.bool)
    bias[0, :, :, 1] = -1e9
    torch.compiler.reset()
    compiled = torch.compile(door, fullgraph=True, backend="eager")
    assert compiled(bias, query).equal(door(bias, query))
    # Tensors without values: what looked at one would raise.
    mask = AttentionMask(query=query.to("meta"))
    assert rule(bias.to("meta"), mask, SCORES.to("meta"))[1].key.device.type == "meta"


@pytest.mark.parametrize("bias", [torch.ones(1, 1, 4, 5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.int64)])
def test_masks_of_no_float_dtype_are_refused(bias):
    with pytest.raises(TypeError, match="AttentionMask"):
        forbid(bias, None, SCORES)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (1, 2, 3, 4, 5), (2, 2, 4, 5)])
def test_a_bias_that_doesnt_broadcast_is_refused(shape):
    with pytest.raises(ValueError, match="broadcast"):
        forbid(torch.zeros(shape), None, SCORES)
