"""Batch norm over real tokens, against PyTorch's for the list of them."""

import pytest
import torch
from torch import nn

from sinkformer_pl.models.batch_norm import MaskedBatchNorm


def pair(dim=5, dtype=torch.float64):
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm(dim), nn.BatchNorm1d(dim)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    assert ours.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys == ["num_batches_tracked"]
    return ours.to(dtype), theirs.to(dtype)


def tokens(*shape, seed=1):
    return 3 + 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("filler", [0.0, 1e30, torch.nan])
@pytest.mark.parametrize("axes", [2, 3])
def test_it_is_pytorchs_for_the_list_of_real_tokens(axes, filler):
    ours, theirs = pair()
    mask = torch.arange(6) < torch.tensor([[6], [2], [0], [3]])
    x = tokens(4, 6, 5)
    if axes == 3:
        x, mask = tokens(4, 6, 3, 5), mask[..., None]
    real = mask.expand(x.shape[:-1])
    x = x.where(real[..., None], filler).requires_grad_()
    listed = x.detach()[real].requires_grad_()
    for _ in range(2):
        found, wanted = ours(x, mask), theirs(listed)
        torch.testing.assert_close(found[real], wanted)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    upstream = torch.randn_like(wanted)
    found[real].backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(x.grad[real], listed.grad)
    assert (x.grad[~real] == 0).all()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(ours.eval()(x, mask)[real], theirs.eval()(listed))


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5), (2, 3, 4, 5)])
def test_without_a_mask_it_is_pytorchs(shape):
    ours, theirs = pair()
    x = tokens(*shape)
    torch.testing.assert_close(ours(x), theirs(x.reshape(-1, 5)).view(shape))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.reshape(-1, 5)).view(shape))


def test_a_single_token_meets_the_running_statistics():
    ours, _ = pair()
    ours(tokens(9, 5))
    before, x = ours.running_var.clone(), tokens(1, 5)
    for found in (ours(x), ours(x.expand(3, 5)[None], torch.tensor([[False, True, False]]))[:, 1]):
        assert ours.running_var.equal(before)
        torch.testing.assert_close(found, ours.eval()(x))
        ours.train()
    assert ours(x[None], torch.tensor([[False]])).isfinite().all()
    assert ours.running_var.equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_taken_in_single_precision(dtype):
    ours, _ = pair(dtype=dtype)
    x, mask = tokens(3, 400, 5).to(dtype), torch.arange(400) < torch.tensor([[400], [300], [1]])
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x, mask)
    assert found.dtype == dtype
    wanted, _ = pair()
    wanted.load_state_dict(pair(dtype=dtype)[0].state_dict())
    bound = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found[mask].double(), wanted(x.double(), mask)[mask], rtol=bound, atol=bound)
