"""An additive mask means the same in every member, dtype and backend; a row that isn't finite is no index error."""

from functools import partial

import pytest
import torch

from sinkformer_pl import ops
from sinkformer_pl.normalizations import Entmax15, GumbelSinkhorn, Sinkhorn, Softmax, Sparsemax, registered
from sinkformer_pl.ops import AttentionMask

TAKING = [name for name, cls in registered().items() if cls.takes_bias]
LOWEST = torch.finfo(torch.float32).min
SINKHORNS = {"Sinkhorn": partial(Sinkhorn, n_iters=5), "GumbelSinkhorn": partial(GumbelSinkhorn, n_iters=5)}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def made(name):
    module = SINKHORNS.get(name, registered()[name])()
    module.build(3, 8)
    return module.eval()


@pytest.mark.parametrize("value", [LOWEST, -1e9, -torch.inf])
@pytest.mark.parametrize("name", TAKING)
def test_an_additive_padding_mask_is_padding(name, value):
    q, k, v = inputs()
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    bias = torch.zeros(2, 1, 1, 6).masked_fill(~real[:, None, None], value)
    module, mask = made(name), AttentionMask(key=real)
    wanted, found = module.attend(q, k, v, mask), module.attend(q, k, v, bias=bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.weights(q, k, bias=bias), module.weights(q, k, mask), rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TAKING)
def test_the_lowest_number_of_a_half_precision_forbids_too(name, dtype):
    q, k, v = (x.detach() for x in inputs(dtype))
    bias = torch.zeros(2, 1, 1, 6, dtype=dtype)
    bias[1, ..., 4:] = torch.finfo(dtype).min
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    wanted = made(name).attend(q, k, v, AttentionMask(key=real))
    torch.testing.assert_close(made(name).attend(q, k, v, bias=bias), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize("lam", [1.0, 0.5])
@pytest.mark.parametrize("n_iters", [1, 4, 5, 31])
def test_the_backends_agree_with_the_loop_and_are_finite(backend, lam, n_iters):
    q, k, v = inputs(torch.float64)
    bias = torch.zeros(2, 3, 5, 6, dtype=torch.float64)
    bias[0, :, 1, 2] = bias[0, :, :, 3] = bias[0, 1, :, 4] = bias[1, :, 2] = bias[1, 0, 4] = LOWEST
    query = torch.tensor([[True] * 4 + [False], [True] * 5])
    mask = AttentionMask(query=query)
    weights = ops.sinkhorn(q @ k.mT / 8**0.5 + bias, n_iters, mask=mask, lam=lam)
    output = ops.sinkhorn_attention(q, k, v, n_iters=n_iters, mask=mask, bias=bias, lam=lam, backend=backend)
    assert (weights[bias < 0] == 0).all()
    torch.testing.assert_close(output, weights @ v)
    wanted = torch.autograd.grad((weights @ v).sin().sum(), (q, k, v))
    for found, right in zip(torch.autograd.grad(output.sin().sum(), (q, k, v)), wanted, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, right)


def test_what_cant_be_reached_shows_in_the_residual():
    q, k, _ = inputs(torch.float64)
    bias = torch.zeros(5, 6, dtype=torch.float64)
    bias[0, 1:] = bias[1, 1:] = -torch.inf  # two queries of one key, whose column can't sum to 5/6 then
    weights = Sinkhorn(n_iters=501).weights(q, k, bias=bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    assert (ops.marginal_error(weights) > 0.1).all()


def test_the_rule_looks_at_the_bias_alone_under_noise():
    q, k, v = (x.detach() for x in inputs())
    bias = torch.zeros(1, 1, 5, 6)
    bias[..., 2] = LOWEST
    module = GumbelSinkhorn().train()
    torch.manual_seed(0)
    assert (module.weights(q, k, bias=bias)[..., 2] == 0).all()
    assert module.attend(q, k, v, bias=bias).isfinite().all()


@pytest.mark.parametrize("cls", [Sparsemax, Entmax15, partial(registered()["Entmax"]), Softmax])
def test_rows_that_arent_finite(cls):
    scores = torch.randn(1, 1, 6, 5)
    scores[..., 0, :], scores[..., 1, 2], scores[..., 2, 3] = torch.nan, torch.nan, torch.inf
    scores[..., 3, :], scores[..., 4, 1] = -torch.inf, -torch.inf
    weights = cls()(scores, AttentionMask())[0, 0]
    assert weights[:3].isnan().any(-1).all()
    assert (weights[3] == 0).all()
    assert weights[4, 1] == 0
    torch.testing.assert_close(weights[4:].sum(-1), torch.ones(2))


@pytest.mark.parametrize("name", list(registered()))
@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
def test_no_tokens(name, queries, keys, batch):
    if queries != keys and registered()[name].requires_square:
        pytest.skip("square")
    q = torch.zeros(batch, 3, queries, 8, requires_grad=True)
    k = q if registered()[name].requires_tied else torch.zeros(batch, 3, keys, 8)
    module, v = made(name), torch.ones(batch, 3, keys, 4)
    output = module.attend(q, k, v)
    assert output.shape == (batch, 3, queries, 4)
    assert module.weights(q, k).shape == (batch, 3, queries, keys)
    assert (output == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), q)
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", ["auto", "reference", "dense", "streaming"])
def test_no_tokens_with_information(backend):
    q, k = torch.zeros(2, 3, 0, 8), torch.zeros(2, 3, 5, 8)
    for one, other in ((q, k), (k, q)):
        output, info = ops.sinkhorn_attention(one, other, other, backend=backend, return_info=True)
        assert output.shape == one.shape
        assert (info.f.shape, info.g.shape, info.residual.shape) == (one.shape[:-1], other.shape[:-1], (2, 3))
