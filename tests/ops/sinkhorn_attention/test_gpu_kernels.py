"""The kernels for GPUs: in Triton's interpreter, in processes of their own, or on CUDA where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sinkformer_pl.ops import sinkhorn_attention
from sinkformer_pl.ops.sinkhorn_attention import gpu

pytest.importorskip("triton", reason="Triton isn't installed: there are no kernels to try")

from tests.ops.sinkhorn_attention.kernel_cases import SIZES

CASES = Path(__file__).with_name("kernel_cases.py")


def try_kernels(*arguments: str) -> list[str]:
    """Return what the process of the cases prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(CASES), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_each_kernel_agrees_with_the_reference():
    *failed, summary = try_kernels(*SIZES)
    assert not failed, "\n".join(failed)
    assert all(kind in summary for kind in SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_a_kernel_agrees_with_the_reference_for_every_pair_of_features(kind):
    *failed, summary = try_kernels(kind, "all")
    assert not failed, "\n".join(failed)
    assert kind in summary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [101_376, 166_912, 232_448])
def test_every_size_has_a_kernel(dtype, limit):
    from sinkformer_pl.ops.sinkhorn_attention.gpu.choice import choose

    def kind(queries, keys, width=64, n_iters=3, gradient="unrolled"):
        return choose(queries, keys, width, width, dtype, n_iters, gradient, limit).kind

    half = dtype != torch.float32
    assert kind(65, 65) == kind(100, 128) == "keys on chip"
    assert kind(1000, 16) == "keys on chip"
    assert kind(16, 1000) == "queries on chip"
    assert kind(256, 256) == ("keys on chip" if half and limit > 120_000 else "streaming")
    assert kind(60, 60, n_iters=21) == "on chip"
    assert kind(60, 60, n_iters=21, gradient="implicit") == "keys on chip"
    assert kind(60, 60, n_iters=301) == "keys on chip"
    for queries, keys, width in ((1024, 1024, 64), (300, 300, 8), (10, 10, 256), (65, 65, 200), (1, 100_000, 256)):
        assert kind(queries, keys, width) == "streaming"


def test_what_the_kernels_cant_take_is_told_or_left_to_the_other_backends(monkeypatch):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="CUDA"):
        sinkhorn_attention(q, q, q, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.reason_against(q, q) is None
    assert "float64" in gpu.reason_against(q.double(), q.double())
    assert "256 features" in gpu.reason_against(torch.randn(1, 2, 5, 300), q)
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    with pytest.raises(NotImplementedError, match="Triton"):
        sinkhorn_attention(q, q, q, backend="triton")
    # "auto" takes the CPU's there.
    torch.testing.assert_close(sinkhorn_attention(q, q, q), sinkhorn_attention(q, q, q, backend="reference"))


def test_auto_takes_the_kernels_on_a_gpu(cuda):
    for queries, keys, width in ((65, 65, 64), (1000, 16, 64), (16, 1000, 64), (1024, 1024, 64), (33, 33, 256)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k = (torch.randn(2, 2, n, width, device=cuda, dtype=dtype) for n in (queries, keys))
            assert torch.equal(sinkhorn_attention(q, k, k), sinkhorn_attention(q, k, k, backend="triton"))


def test_twice_the_same_to_the_last_bit(cuda):
    for queries, keys, n_iters in ((65, 65, 3), (65, 65, 21), (1000, 16, 3), (16, 1000, 3), (600, 600, 5)):
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            inputs = [torch.randn(2, 2, n, 64, device=cuda, requires_grad=True) for n in (queries, keys, keys)]
            output = sinkhorn_attention(*inputs, n_iters=n_iters)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
