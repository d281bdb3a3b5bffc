"""Threads of Python that work on blocks of heads: right wherever they are called from, without a trace elsewhere."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sinkformer_pl.ops import sinkhorn_attention
from sinkformer_pl.ops.sinkhorn_attention import blocks
from sinkformer_pl.ops.sinkhorn_attention.threads import together


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Two threads, for problems of any size."""
    monkeypatch.setattr(blocks, "ALONE_BYTES", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["whole heads", "shared heads"])
def shared(request, monkeypatch):
    if request.param == "shared heads":
        monkeypatch.setattr(blocks, "SHARED_BYTES", 0)
        monkeypatch.setattr(blocks, "MIN_ROWS", 4)


def in_fresh_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def attend(backend, seed=0):
    """Output and gradients of a small problem."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, 3, 11, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    if torch.is_inference_mode_enabled():
        return [sinkhorn_attention(*inputs, n_iters=5, backend=backend)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output = sinkhorn_attention(*inputs, n_iters=5, backend=backend)
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


def agrees(found, seed=0):
    return all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, attend("reference", seed), strict=False))


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("backend", ["dense", "streaming"])
def test_right_in_any_mode(backend):
    assert agrees(attend(backend))
    with torch.inference_mode():
        assert agrees(attend(backend))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agrees(attend(backend))
    assert agrees(attend(backend))


@pytest.mark.usefixtures("shared")
def test_several_callers_at_once_wait_for_each_other():
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda seed: attend("dense", seed % 5), range(60)))
    for seed in range(5):
        for others in found[seed + 5 :: 5]:
            assert all(torch.equal(a, b) for a, b in zip(found[seed], others, strict=True))
        assert agrees(found[seed], seed)


@pytest.mark.usefixtures("shared")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    wanted = attend("dense")
    child = os.fork()
    if not child:
        signal.alarm(20)  # A child that waits for threads that it hasn't would wait for ever.
        try:
            # No backward: autograd can't be forked where anything before has started threads of its own.
            with torch.inference_mode():
                (output,) = attend("dense")
            os._exit(0 if torch.equal(output, wanted[0]) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(attend("dense"), wanted, strict=True))


def test_operators_of_a_member_run_in_one_thread_and_nobody_else_notices():
    torch.set_num_threads(3)
    seen = []
    together(3, lambda member: seen.append((member.rank, threading.get_ident(), torch.get_num_threads())))
    assert sorted((rank, number) for rank, _, number in seen) == [(0, 1), (1, 1), (2, 1)]
    assert len({thread for _, thread, _ in seen} | {threading.get_ident()}) == 4
    assert torch.get_num_threads() == in_fresh_thread(torch.get_num_threads) == 3


def test_who_asks_for_one_thread_gets_no_other():
    torch.set_num_threads(1)
    seen = []
    blocks.each_block(torch.ones(5, 4, 2), torch.ones(5, 4, 2), lambda *_: seen.append(threading.get_ident()))
    assert set(seen) == {threading.get_ident()}


def test_each_part_of_the_work_is_done_once(monkeypatch):
    done = torch.zeros(7, 9, dtype=torch.int64)
    for size, shared in ((1, False), (2**20, False), (1, True)):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        monkeypatch.setattr(blocks, "MIN_ROWS", 4 if shared else 128)

        def work(heads, queries, member):
            done[heads, queries] += 1

        blocks.each_block(torch.ones(7, 9, 2), torch.ones(7, 3, 2), work)
    assert (done == 3).all()


def test_the_parts_of_all_members_are_reduced_in_order():
    totals = {}

    def work(member):
        totals[member.rank] = [member.over(torch.sub, torch.tensor(100**member.rank + turn)) for turn in range(50)]

    together(3, work)
    wanted = [(1 + turn) - (100 + turn) - (10_000 + turn) for turn in range(50)]
    assert totals == {rank: wanted for rank in range(3)}


def test_an_error_in_one_thread_reaches_the_caller_and_ends_the_others():
    def work(member):
        if member.rank == 1:
            raise MemoryError("no room")
        member.over(torch.add, torch.ones(2))

    with pytest.raises(MemoryError, match="no room"):
        together(3, work)
    assert agrees(attend("dense"))
