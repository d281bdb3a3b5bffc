"""Calls of kernels that were compiled before, with a driver that notes them in the place of a GPU's."""

import importlib
import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton isn't installed: there are no kernels to start")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
start_file = importlib.import_module("sinkformer_pl.ops.sinkhorn_attention.gpu.start")
kernels = importlib.import_module("sinkformer_pl.ops.sinkhorn_attention.gpu.streaming_backward")


@pytest.fixture
def started(monkeypatch):
    """Return the list of all starts: the loaded kernel, the numbers of programs, the arguments."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, whose driver is in use")
    calls, numbers = [], itertools.count()

    class Launcher:
        def __init__(self, source, metadata):
            pass

        def __call__(self, x, y, z, stream, function, *rest):
            calls.append((function, (x, y, z), rest[4:]))  # after the metadata and the hooks

    class Driver:
        launcher_cls = Launcher
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

        class utils:
            get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232_448})
            load_binary = staticmethod(lambda *_: (object(), next(numbers), 1, 0, 1024))

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(start_file, "_compiled", {})
    return calls


def test_a_call_like_an_earlier_one_starts_what_triton_would(started):
    memory = torch.zeros(2**14, dtype=torch.bfloat16)
    constants = {"DV": 16, "DVB": 16, "BQ": 16, "DAMPED": False}

    def tensors(offset, with_first):
        output = memory[offset : offset + 2 * 3 * 40 * 16].view(2, 3, 40, 16)
        potential = torch.zeros(6, 40)
        return output, memory.view_as(memory), potential if with_first else None, potential, potential, potential

    # Tensors that aren't aligned, one that is None, an integer that is 1, and one that is a multiple of 16.
    for offset, with_first, heads, queries in ((0, True, 3, 40), (1, True, 3, 40), (0, False, 3, 40), (0, True, 1, 32)):
        arguments = (*tensors(offset, with_first), *(1920, 640, 16) * 2, heads, queries, 1)
        started.clear()
        for _ in range(2):
            start_file.start(kernels.output_cotangents, 6, *arguments, warps=4, stages=3, **constants)
        kernels.output_cotangents[(6,)](*arguments, **constants, num_warps=4, num_stages=3)
        first, again, plain = started
        for call in (first, again):
            assert call[:2] == plain[:2]
            assert len(call[2]) == len(plain[2])
            assert all(a is b or a == b for a, b in zip(call[2], plain[2], strict=True))
