"""Expected sliced transport against POT, against the formula, and in its limits."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkformer_pl.ops import AttentionMask, causal_pairs, marginal_error
from sinkformer_pl.ops.sliced_transport import sliced_transport
from tests.optional import ot

# The package gives the function of this name.
module_of_function = importlib.import_module("sinkformer_pl.ops.sliced_transport")

REAL = torch.tensor([[True, False, True, True, True, True], [False, True, True, False, True, True]])
OTHER = REAL.flip(-1)


def inputs(n=6, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, n, width), (2, 3, n, width), (2, 3, n, 5), (3, 2, width))
    q, k, v, directions = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype), directions


def weights(q, k, sort=0.1, slices=0.7, **arguments):
    identity = torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:-1], -1)
    return sliced_transport(q, k, identity, sort_temperature=sort, slice_temperature=slices, **arguments)


def by_formula(q, k, sort, slices, projections):
    """The definition, for one sample and head, with all of its matrices; projections are columns (D, m)."""
    n, plans, costs = len(q), [], []
    for x, y in zip((q @ projections).T, (k @ projections).T, strict=True):
        a, b = (torch.softmax(-((z.sort().values[:, None] - z[None]) ** 2) / sort, 1) for z in (x, y))
        plans.append(a.T @ b / n)
        costs.append((plans[-1] * (q[:, None] - k[None]).norm(dim=-1)).sum())
    shares = torch.softmax(-torch.stack(costs) / slices, 0)
    return n * sum(share * plan for share, plan in zip(shares, plans, strict=True))


def projections(directions, head, width):
    if directions is None:
        return torch.eye(width, dtype=torch.float64)
    return (directions[head] / directions[head].norm(dim=-1, keepdim=True)).T


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("sort", [0, 1e-18], ids=["hard", "limit of soft"])
@pytest.mark.parametrize("n", [2, 9, 40])
def test_hard_ranks_are_the_expected_sliced_plan_of_pot(n, sort, learned):
    q, k, v, directions = inputs(n)
    directions, scale = directions if learned else None, torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
    found = weights(q, k, sort, 0.3, scale=scale, directions=directions)
    for sample, head in np.ndindex(2, 3):
        a, b = (x[sample, head].numpy() * math.sqrt(scale[head]) for x in (q, k))
        plan, _ = ot.expected_sliced_plan(
            a, b, projections=projections(directions, head, 4).numpy(), metric="euclidean", beta=1 / 0.3
        )
        torch.testing.assert_close(found[sample, head], torch.from_numpy(n * plan), rtol=1e-9, atol=1e-12)
    output = sliced_transport(q, k, v, sort_temperature=sort, slice_temperature=0.3, scale=scale, directions=directions)
    torch.testing.assert_close(output, found @ v)


@pytest.mark.parametrize("tokens_at_once", [1, 13, 1024])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("sort", [0.03, 2.0])
def test_soft_ranks_are_the_formula(sort, learned, tokens_at_once, monkeypatch):
    monkeypatch.setattr(module_of_function, "_TOKENS", tokens_at_once)  # 1 slice, 2 slices, all at once
    q, k, v, directions = (x.requires_grad_() for x in inputs())
    leaves = (q, k, v, directions) if learned else (q, k, v)
    output = sliced_transport(
        q, k, v, sort_temperature=sort, slice_temperature=0.4, scale=0.5, directions=directions if learned else None
    )
    root = math.sqrt(0.5)
    wanted = torch.stack([
        torch.stack([
            by_formula(root * q[i, h], root * k[i, h], sort, 0.4, projections(directions if learned else None, h, 4))
            @ v[i, h]
            for h in range(3)
        ])
        for i in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(output, wanted)
    for found, right in zip(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (output, wanted)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens_at_once", [1, 1024])
def test_hard_ranks_in_groups_of_slices(tokens_at_once, monkeypatch):
    q, k, v, _ = (x.requires_grad_() for x in inputs())
    wanted = sliced_transport(q, k, v, sort_temperature=1e-12, slice_temperature=0.4)
    monkeypatch.setattr(module_of_function, "_TOKENS", tokens_at_once)
    output = sliced_transport(q, k, v, sort_temperature=0, slice_temperature=0.4)
    torch.testing.assert_close(output, wanted)
    for found, right in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (output, wanted)), strict=True):
        torch.testing.assert_close(found, right)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from([0, 1e-3, 0.1, 5.0]), st.sampled_from([0.05, 1.0, 50.0]))
def test_mass_is_the_number_of_queries_and_hard_plans_are_doubly_stochastic(n, seed, sort, slices):
    q, k, *_ = inputs(n, seed=seed)
    found = weights(q, k, sort, slices)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum((-2, -1)), torch.full((2, 3), float(n), dtype=torch.float64))
    if sort == 0:
        assert marginal_error(found).max() < 1e-12
        assert ((found > 0).sum(-1) <= 4).all()  # one key for each slice


def test_plans_come_near_doubly_stochastic_as_the_temperature_falls():
    q, k, *_ = inputs(30)
    errors = [float(marginal_error(weights(q, k, sort)).max()) for sort in (1.0, 1e-2, 1e-4, 1e-6, 1e-12)]
    assert 0.05 < errors[0] < 0.5
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_a_low_slice_temperature_takes_the_cheapest_slice_and_a_high_one_the_mean():
    q, k, *_ = inputs(12)
    each = torch.stack([weights(q, k, 0, 1.0, directions=torch.eye(4)[[i]].expand(3, -1, -1)) for i in range(4)])
    cost = (each * torch.cdist(q, k)).sum((-2, -1))
    cheapest = each.gather(0, cost.argmin(0)[None, ..., None, None].expand_as(each[:1]))[0]
    torch.testing.assert_close(weights(q, k, 0, 1e-6), cheapest)
    torch.testing.assert_close(weights(q, k, 0, 1e9), each.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("filler", [-3.0, 1e30])
@pytest.mark.parametrize("sort", [0, 0.1])
def test_padding_is_in_no_plan(sort, filler):
    q, k, v, directions = inputs()
    q, k = q.where(REAL[:, None, :, None], filler), k.where(OTHER[:, None, :, None], filler)
    leaves = [x.requires_grad_() for x in (q, k, v.where(OTHER[:, None, :, None], filler))]
    arguments = {"sort_temperature": sort, "slice_temperature": 0.7, "directions": directions if sort else None}
    output = sliced_transport(*leaves, mask=AttentionMask(REAL, OTHER), **arguments)
    gradients = torch.autograd.grad(output.sin().sum(), leaves)
    for i in range(2):
        sides = (REAL[i], OTHER[i], OTHER[i])
        alone = [x.detach()[i : i + 1, :, real].requires_grad_() for x, real in zip(leaves, sides, strict=True)]
        wanted = sliced_transport(*alone, **arguments)
        torch.testing.assert_close(output[i : i + 1, :, REAL[i]], wanted)
        assert not output[i, :, ~REAL[i]].any()
        for found, right, real in zip(gradients, torch.autograd.grad(wanted.sin().sum(), alone), sides, strict=True):
            torch.testing.assert_close(found[i : i + 1, :, real], right, rtol=1e-9, atol=1e-11)
            assert not found[i, :, ~real].any()


@pytest.mark.parametrize("sort", [0, 0.1])
def test_gradients_are_those_of_finite_differences(sort):
    q, k, v, directions = (x.requires_grad_() for x in inputs(4))
    scale, mask = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64, requires_grad=True), AttentionMask(
        REAL[:, :4].flip(-1), REAL[:, :4]
    )  # fmt: skip
    directions = directions if sort else None

    def attended(q, k, v, scale, *directions):
        given = {"directions": directions[0] if directions else None, "scale": scale, "mask": mask}
        return sliced_transport(q, k, v, sort_temperature=sort, slice_temperature=0.3, **given)

    leaves = (q, k, v, scale) if directions is None else (q, k, v, scale, directions)
    assert torch.autograd.gradcheck(attended, leaves, atol=1e-8, rtol=1e-6)


def test_equal_queries_and_keys_have_finite_gradients():
    q = torch.ones(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    for sort in (0, 0.1):
        output = sliced_transport(q, q, q, sort_temperature=sort, slice_temperature=1.0)
        (gradient,) = torch.autograd.grad(output.sum(), q)
        assert gradient.isfinite().all()


def test_equal_projections_rank_in_their_order():
    q, k, v = torch.zeros(1, 1, 4, 2), torch.arange(8.0).reshape(1, 1, 4, 2), torch.arange(4.0).reshape(1, 1, 4, 1)
    assert sliced_transport(q, k, v, sort_temperature=0, slice_temperature=1.0).flatten().tolist() == [0, 1, 2, 3]


def test_unequal_numbers_of_real_tokens_are_refused():
    q, k, v, _ = inputs()
    arguments = {"sort_temperature": 0.1, "slice_temperature": 1.0}
    for mask in (AttentionMask(REAL, REAL & OTHER), AttentionMask(query=REAL), AttentionMask(key=REAL)):
        with pytest.raises(ValueError, match="as many real queries as real keys, got"):
            sliced_transport(q, k, v, mask=mask, **arguments)
    with pytest.raises(ValueError, match="as many queries as keys"):
        sliced_transport(q[:, :, 1:], k, v, **arguments)
    all_real = AttentionMask(key=torch.ones(2, 6, dtype=torch.bool))
    assert sliced_transport(q, k, v, mask=all_real, **arguments).equal(sliced_transport(q, k, v, **arguments))


@pytest.mark.parametrize("sort", [0, 0.1])
def test_where_tokens_cant_be_counted_unequal_numbers_give_nan(sort, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, v, _ = inputs()
    mask = AttentionMask(REAL, torch.stack([REAL[0], REAL[0]]))
    output = sliced_transport(q, k, v, mask=mask, sort_temperature=sort, slice_temperature=1.0)
    assert output[0].isfinite().all()
    assert output[1].isnan().all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sort_temperature": -0.1}, "sort_temperature must be finite and at least 0 .* got -0.1"),
        ({"sort_temperature": math.nan}, "sort_temperature must be finite"),
        ({"slice_temperature": 0.0}, "slice_temperature must be finite and above 0, got 0.0"),
        ({"slice_temperature": math.inf}, "slice_temperature must be finite and above 0, got inf"),
        ({"scale": 0.0}, "needs a scale above 0"),
        ({"scale": -1.0}, "needs a scale above 0.*got -1.0"),
        ({"directions": torch.ones(2, 1, 4)}, r"directions \(2, 1, 4\) don't fit q \(2, 3, 6, 4\)"),
        ({"directions": torch.ones(3, 1, 5)}, r"they need \(H, m, D\)"),
    ],
)
def test_arguments_out_of_range_are_refused(changed, words):
    arguments = {"sort_temperature": 0.1, "slice_temperature": 1.0, **changed}
    with pytest.raises(ValueError, match=words):
        sliced_transport(*inputs()[:3], **arguments)


def test_pairs_are_refused():
    with pytest.raises(NotImplementedError, match="can't honour forbidden pairs"):
        weights(*inputs()[:2], mask=AttentionMask(pairs=causal_pairs(6, 6)))


def test_the_backward_keeps_less_than_one_matrix_for_each_slice():
    n, width, kept = 1024, 16, {}
    q, k, v = (torch.randn(1, 1, n, width, requires_grad=True) for _ in range(3))

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for sort, matrices in ((0.1, 3), (0, 0.6)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sliced_transport(q, k, v, sort_temperature=sort, slice_temperature=1.0)
        assert sum(kept.values()) <= matrices * n * n * 4
