"""SemiUnbalancedSinkhorn between its two limits, against unbalanced transport, and its learned strength."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from sinkformer_pl import ops
from sinkformer_pl.normalizations import Sinkhorn, Softmax
from sinkformer_pl.normalizations.semi_unbalanced_sinkhorn import SemiUnbalancedSinkhorn
from sinkformer_pl.ops import AttentionMask, causal_pairs
from tests.optional import ot

MASK = AttentionMask(torch.arange(5).expand(2, -1) < 4, torch.arange(6).expand(2, -1) > 1)


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4), (2, 3, 5, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def learned(rho=2.0, n_iters=3):
    module = SemiUnbalancedSinkhorn(rho, learned=True, n_iters=n_iters)
    module.build(num_heads=3, head_dim=8)
    return module.double()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(
    ("rho", "wanted"), [(0.0, Softmax), (math.inf, partial(Sinkhorn, n_iters=7)), (1e300, partial(Sinkhorn, n_iters=7))]
)
def test_the_limits_are_softmax_and_sinkhorn(rho, wanted, mask):
    q, k, v, bias = inputs()
    module, given = SemiUnbalancedSinkhorn(rho, n_iters=7), {"scale": 0.5, "bias": bias}
    torch.testing.assert_close(module.weights(q, k, mask, **given), wanted().weights(q, k, mask, **given))
    torch.testing.assert_close(module.attend(q, k, v, mask, **given), wanted().attend(q, k, v, mask, **given))


@pytest.mark.filterwarnings("ignore:If reg_type = entropy")
@pytest.mark.parametrize("rho", [0.1, 1.0, 5.0])
def test_many_half_steps_are_semi_unbalanced_transport(rho):
    q, k, *_ = inputs()
    weights = SemiUnbalancedSinkhorn(rho, n_iters=501).weights(q, k, None, scale=0.5)[0, 0]
    rows, columns, cost = np.ones(5), np.full(6, 5 / 6), (-0.5 * q @ k.mT)[0, 0].numpy()
    wanted = ot.unbalanced.sinkhorn_unbalanced(rows, columns, cost, 1.0, (math.inf, rho), reg_type="entropy",
                                               numItermax=20000, stopThr=1e-13)  # fmt: skip
    torch.testing.assert_close(weights, torch.from_numpy(wanted), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n_iters", [3, 101])
def test_columns_come_closer_with_rho_and_rows_are_exact(n_iters):
    q, k, *_ = inputs()
    errors = []
    for rho in (0.0, 0.1, 1.0, 10.0, math.inf):
        weights = SemiUnbalancedSinkhorn(rho, n_iters=n_iters).weights(q, k, None, scale=0.5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
        errors.append(ops.marginal_error(weights).mean())
    assert all(later < 0.95 * earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("module", [SemiUnbalancedSinkhorn(0.7), learned()], ids=["fixed", "learned"])
def test_attend_is_weights_times_values(module, mask):
    q, k, v, bias = inputs()
    scale = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    weights = module.weights(q, k, mask, scale=scale, bias=bias)
    torch.testing.assert_close(module.attend(q, k, v, mask, scale=scale, bias=bias), weights @ v)


def test_each_head_learns_its_own_strength():
    q, k, *_ = inputs()
    module, rhos = learned(), (0.2, 1.0, 30.0)
    assert module.log_rho is not None
    module.log_rho.data.copy_(torch.tensor(rhos).log())
    assert isinstance(module.lam, torch.Tensor)
    torch.testing.assert_close(module.lam, torch.tensor([rho / (1 + rho) for rho in rhos]).double())
    weights = module.weights(q, k, None, scale=0.5)
    for head, rho in enumerate(rhos):
        alone = SemiUnbalancedSinkhorn(rho).weights(q, k, None, scale=0.5)
        torch.testing.assert_close(weights[:, head], alone[:, head], rtol=1e-6, atol=1e-8)


def test_a_learned_strength_starts_at_the_given_one():
    q, k, v, _ = inputs()
    found, wanted = (m.attend(q, k, v, None, scale=0.5) for m in (learned(2.0), SemiUnbalancedSinkhorn(2.0)))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    assert {name: p.shape for name, p in learned().named_parameters()} == {"log_rho": (3,)}
    assert not list(SemiUnbalancedSinkhorn(2.0).parameters())


@pytest.mark.parametrize("method", ["attend", "weights"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_gradcheck_of_the_strength(mask, method):
    q, k, v, _ = inputs()
    module = learned(n_iters=5)
    tensors = (q, k, v) if method == "attend" else (q, k)
    assert torch.autograd.gradcheck(
        lambda *_: getattr(module, method)(*tensors, mask, scale=0.5), tuple(module.parameters()), atol=1e-8
    )


def test_the_damping_shown():
    assert [SemiUnbalancedSinkhorn(rho).lam for rho in (0, 1, 3.0, math.inf)] == [0, 0.5, 0.75, 1]
    torch.testing.assert_close(learned(3.0).lam, torch.full((3,), 0.75, dtype=torch.float64))
    assert repr(SemiUnbalancedSinkhorn(3.0)) == "SemiUnbalancedSinkhorn(rho=3.0, learned=False, n_iters=3)"


def test_columns_are_promised_by_the_balanced_one_alone():
    assert SemiUnbalancedSinkhorn(math.inf).promises == Sinkhorn().promises
    for other in (SemiUnbalancedSinkhorn(), SemiUnbalancedSinkhorn(1e9), SemiUnbalancedSinkhorn(math.inf, n_iters=1)):
        assert not other.promises.unit_columns


@pytest.mark.parametrize("rho", [-0.1, math.nan, -math.inf, "1", None, True])
def test_strengths_out_of_range_are_refused(rho: Any):
    with pytest.raises(ValueError, match=r"rho must be a number in \[0, inf\], got"):
        SemiUnbalancedSinkhorn(rho)


@pytest.mark.parametrize("rho", [0.0, 1e15, math.inf])
def test_a_strength_without_a_gradient_isnt_learned(rho):
    with pytest.raises(ValueError, match=f"starts above 0 and below 1e\\+15, got {rho}"):
        SemiUnbalancedSinkhorn(rho, learned=True)
    with pytest.raises(ValueError, match="no column step to learn rho from"):
        SemiUnbalancedSinkhorn(learned=True, n_iters=1)


def test_even_half_steps_and_pairs_are_refused():
    with pytest.raises(ValueError, match=r"SemiUnbalancedSinkhorn: n_iters .* use an odd number"):
        SemiUnbalancedSinkhorn(n_iters=2)
    q, k, v, _ = inputs()
    with pytest.raises(NotImplementedError, match="pairs"):
        SemiUnbalancedSinkhorn().attend(q, k, v, AttentionMask(pairs=causal_pairs(5, 6)), scale=1.0)
