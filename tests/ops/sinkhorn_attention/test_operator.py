"""Sinkhorn attention as one operator: for PyTorch's own checks, for compilers and for exports."""

import pytest
import torch

from sinkformer_pl.models import SetTransformer, VisionTransformer
from sinkformer_pl.normalizations import GumbelSinkhorn, LowRankSinkhorn, SemiUnbalancedSinkhorn, Sinkhorn
from sinkformer_pl.ops import AttentionMask, sinkhorn_attention
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs


def operator_inputs(backend, dtype=torch.float32, everything=False):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (5, 7, 7))
    log_row = log_column = bias = scale = lam = None
    if everything:
        log_row = torch.randn(2, 3, 5).log_softmax(-1).requires_grad_()
        log_column = torch.randn(2, 3, 7).log_softmax(-1).requires_grad_()
        scale, lam = torch.rand(2, 3).requires_grad_(), torch.rand(2, 3).requires_grad_()
        bias = torch.randn(2, 3, 5, 7).requires_grad_() if backend == "dense" else None
    return OperatorInputs(q, k, v, bias, log_row, log_column, scale, lam, 0.3, 0.9, 4, "unrolled", backend)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["dense", "streaming"])
def test_the_operator_is_what_pytorch_expects_of_one(backend, dtype, everything):
    torch.manual_seed(0)
    inputs = operator_inputs(backend, dtype, everything)
    operator = torch.ops.sinkformer_pl.sinkhorn_attention
    torch.library.opcheck(operator, tuple(inputs), test_utils=("test_schema", "test_autograd_registration"))
    torch.library.opcheck(operator, tuple(inputs), test_utils="test_faketensor")


@pytest.mark.parametrize(
    "normalization",
    [
        Sinkhorn,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (SemiUnbalancedSinkhorn, GumbelSinkhorn, LowRankSinkhorn)),
    ],
)
def test_a_compiled_network_has_no_graph_break(normalization):
    torch.manual_seed(0)
    network = SetTransformer(normalization, in_features=3, dim=16, num_heads=2, inducing_points=4).eval()
    points = torch.randn(2, 9, 3, requires_grad=True)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for way in (network, compiled):
        output = way(points, mask)
        results.append((output, *torch.autograd.grad(output.square().sum(), [points, *network.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_exported_network_keeps_the_operator():
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 4, "channels": 1, "dim": 16, "num_heads": 2}
    network = VisionTransformer(Sinkhorn, **shape, depth=1).eval()
    images = torch.randn(3, 1, 8, 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes]
    assert "sinkformer_pl.sinkhorn_attention.default" in names
    assert not any("logsumexp" in name or "exp2" in name for name in names)
    for some in (images, torch.randn(5, 1, 8, 8)):
        torch.testing.assert_close(program.module()(some), network(some))


def test_a_number_and_a_tensor_are_one_damping_and_one_scale():
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    mask = AttentionMask(key=torch.tensor([[True] * 7, [True] * 4 + [False] * 3]))
    wanted = sinkhorn_attention(q, k, v, n_iters=4, mask=mask, lam=0.4, scale=0.2)
    tensors = {"lam": torch.full((3,), 0.4), "scale": torch.full((3,), 0.2)}
    found = sinkhorn_attention(q, k, v, n_iters=4, mask=mask, **{n: t.double() for n, t in tensors.items()})
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["reference", "dense", "streaming"])
def test_given_marginals_and_their_gradients(backend):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 4, dtype=torch.float64).requires_grad_() for n in (5, 7, 7)]
    row, column = (torch.rand(2, 3, n, dtype=torch.float64).requires_grad_() for n in (5, 7))

    def attend(q, k, v, row, column):
        totals = row.sum(-1, keepdim=True) / column.sum(-1, keepdim=True)
        return sinkhorn_attention(
            q, k, v, n_iters=5, lam=0.7, row_marginal=row, column_marginal=column * totals, backend=backend
        )

    output, info = sinkhorn_attention(
        *inputs, n_iters=301, row_marginal=row, column_marginal=column * (row.sum(-1) / column.sum(-1))[..., None],
        backend=backend, return_info=True,
    )  # fmt: skip
    assert info.residual.max() < 1e-10
    plan = (inputs[0] @ inputs[1].mT / 2 + info.f[..., None] + info.g[..., None, :]).exp()
    torch.testing.assert_close(plan.sum(-1), row)
    torch.testing.assert_close(plan @ inputs[2], output)
    assert torch.autograd.gradcheck(attend, (*inputs, row, column), fast_mode=True)


def test_without_a_gradient_from_above_there_is_none_below():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    Stop.apply(sinkhorn_attention(q, k, v, n_iters=3)).backward()
    assert q.grad is k.grad is v.grad is None
