"""Launches that are remembered and started again for a problem alike, with kernels that are noted in a GPU's place."""

import gc
import importlib
import itertools
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sinkformer_pl.ops import AttentionMask, sinkhorn_attention
from sinkformer_pl.ops.sinkhorn_attention import gpu

triton = pytest.importorskip("triton", reason="Triton isn't installed: there are no kernels to start")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
replay, attention, streaming_forward, streaming_backward = (
    importlib.import_module(f"sinkformer_pl.ops.sinkhorn_attention.gpu.{name}")
    for name in ("replay", "attention", "streaming_forward", "streaming_backward")
)

SIZES = {
    "keys on chip": (40, 40, 3),
    "queries on chip": (16, 300, 3),
    "on chip": (40, 33, 21),
    "streaming": (300, 290, 5),
}


class Compiled:
    """A compiled kernel, which notes its starts."""

    def __init__(self, name, arg_names, notes):
        self.name, self.arg_names, self.notes = name, arg_names, notes

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.notes.append((self.name, grid, list(arguments)))


class Kernel(Compiled):
    """A kernel before it is compiled, which notes the same."""

    def __getitem__(self, grid):
        def start(*arguments, num_warps, num_stages, **constants):
            named = [constants[name] for name in self.arg_names[len(arguments) :]]
            self.notes.append((self.name, (*grid, 1, 1)[:3], [*arguments, *named]))
            return Compiled(self.name, self.arg_names, self.notes)

        return start


@pytest.fixture
def starts(monkeypatch):
    """Return the list of all starts: kernel, number of programs, arguments."""
    notes, modules = [], {*attention.KERNELS.values(), streaming_forward, streaming_backward}
    for module in modules:
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.runtime.JITFunction) and kernel.__module__ == module.__name__:
                monkeypatch.setattr(module, name, Kernel(f"{module.__name__}.{name}", kernel.arg_names, notes))
    monkeypatch.setattr(gpu, "reason_against", lambda q, v: None)
    replay._remembered.clear()
    yield notes
    replay._remembered.clear()


def attend(kind, features, offset=0):
    """Compute an output and all gradients; return the tensors that were given."""
    queries, keys, n_iters = SIZES[kind]
    n_iters += features.get("even", 0)
    memory = torch.randn(3, 2 * 3 * 300 * 16 + 32).to(torch.bfloat16)
    q, k, v = (
        piece[offset : offset + 2 * 3 * tokens * 16].view(2, tokens, 3, 16).transpose(1, 2).requires_grad_()
        for piece, tokens in zip(memory, (queries, keys, keys), strict=True)
    )
    options = {"gradient": features.get("gradient", "unrolled")}
    if "mask" in features:
        lengths = torch.tensor([keys, keys - 9])
        options["mask"] = AttentionMask(
            torch.arange(queries) < lengths.clamp(max=queries)[:, None], torch.arange(keys) < lengths[:, None]
        )
    if "learned" in features:
        learned = features["learned"] != "but held"
        options["lam"], options["scale"] = (torch.full((3,), x, requires_grad=learned) for x in (0.9, 0.3))
        options["bias"] = torch.randn(3, queries, keys, requires_grad=learned)
    output = sinkhorn_attention(q, k, v, n_iters=n_iters, backend="triton", **options)
    output.backward(torch.randn(2, queries, 3, 16).to(torch.bfloat16).transpose(1, 2))
    return q, k, v


FEATURES = [
    {}, {"mask": True}, {"learned": True, "even": 1}, {"gradient": "detached"},
    {"gradient": "detached", "even": 1, "mask": True},
]  # fmt: skip


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("kind", SIZES)
def test_a_problem_alike_starts_the_same_kernels_with_every_memory_moved_as_a_whole(kind, features, starts):
    first = attend(kind, features)
    once = list(starts)
    starts.clear()
    again = attend(kind, features)
    assert len(once) >= 2
    assert [start[:2] for start in starts] == [start[:2] for start in once]
    # Queries, keys and values are parts of one memory.
    moved = {first[0].untyped_storage().data_ptr(): again[0].data_ptr() - first[0].data_ptr()}
    ends = {}
    for (_, _, before), (_, _, after) in zip(once, starts, strict=True):
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            if not isinstance(a, torch.Tensor):
                assert a == b, "a number has changed"
            elif a.numel():
                assert isinstance(b, int), "a tensor is looked at again"
                assert b % 16 == a.data_ptr() % 16, "it was compiled for another alignment"
                memory = a.untyped_storage().data_ptr()
                assert moved.setdefault(memory, b - a.data_ptr()) == b - a.data_ptr()
                ends[memory] = memory + moved[memory], memory + moved[memory] + a.untyped_storage().nbytes()
    ordered = sorted(ends.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ordered)), "two memories overlap"


def test_tensors_that_shared_memory_the_first_time_need_not_do_so_again(starts):
    x = torch.randn(2, 3, 40, 16)
    qkv = torch.randn(2, 3, 40, 48).split(16, -1)
    sinkhorn_attention(x, x, x, n_iters=3, backend="triton")
    sinkhorn_attention(*qkv, n_iters=3, backend="triton")
    for tensors in (
        [torch.randn(2, 3, 40, 16) for _ in range(3)],
        [torch.randn(2, 3, 40, 48)[..., :16] for _ in range(3)],
    ):
        starts.clear()
        sinkhorn_attention(*tensors, n_iters=3, backend="triton")
        assert starts[0][2][:3] == [tensor.data_ptr() for tensor in tensors]


def test_problems_of_other_kinds_are_looked_at_anew(starts):
    attend("keys on chip", {})
    for change in ({"offset": 1}, {"features": {"mask": True}}, {"features": {"even": 1}}, {"kind": "on chip"}):
        starts.clear()
        attend(**{"kind": "keys on chip", "features": {}} | change)
        assert all(any(isinstance(x, torch.Tensor) for x in arguments) for *_, arguments in starts)


def test_gradients_that_are_wanted_now_are_not_left_out_since_they_were_not_wanted_before(starts):
    attend("keys on chip", {"learned": "but held"})
    starts.clear()
    attend("keys on chip", {"learned": True})
    forward, backward = starts
    assert all(isinstance(x, int | float | str | bool | None) for x in forward[2]), "it isn't remembered"
    assert any(isinstance(x, torch.Tensor) for x in backward[2])


def test_what_runs_between_launches_runs_on_the_tensors_of_the_moment():
    def fill(launches):
        first, memory = launches.given
        scratch = launches.scratch(3)
        launches.call(torch.Tensor.copy_, scratch, memory[1:4])
        found = launches.new(first.new_empty(2, 3))
        launches.call(torch.Tensor.copy_, found, first)
        return found, scratch[1:], None

    replay._remembered.clear()
    for seed in (1, 2, 3):
        first, memory = seed + torch.arange(6.0).view(2, 3), seed * torch.arange(5.0)
        found, scratch, nothing = replay.run("fill", (first, memory), (), fill)
        assert torch.equal(found, first)
        assert torch.equal(scratch, memory[2:4])
        assert nothing is None
    assert len(replay._remembered) == 1


class Computes(TorchDispatchMode):
    """Fails where an operation of PyTorch does more than look at or allocate memory."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        moves_nothing = operation.is_view or "empty" in operation.name()
        assert moves_nothing, f"{operation} isn't done again: it must be inside of Launches.call"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("features", [*FEATURES, {"gradient": "implicit", "learned": True}], ids=str)
@pytest.mark.parametrize("kind", SIZES)
def test_nothing_is_computed_that_is_not_done_again(kind, features, starts, monkeypatch):
    first, call = replay.Launches.first, replay.Launches.call

    def watched(launches, function, *arguments):
        with Computes():
            return first(launches, function, *arguments)

    def unwatched(launches, function, *tensors):
        with _disable_current_modes():
            return call(launches, function, *tensors)

    monkeypatch.setattr(replay.Launches, "first", watched)
    monkeypatch.setattr(replay.Launches, "call", unwatched)
    attend(kind, features)


@pytest.mark.parametrize("kind", SIZES)
def test_the_products_of_an_implicit_gradient_are_remembered_too(kind, starts):
    attend(kind, {"gradient": "implicit", "learned": True})
    starts.clear()
    attend(kind, {"gradient": "implicit", "learned": True})
    assert len(starts) > 50
    assert not any(isinstance(x, torch.Tensor) for *_, arguments in starts for x in arguments)


def test_a_problem_on_another_device_is_another_problem():
    x, seen = torch.zeros(3), []
    for tensor in (x, torch.empty(3, device="meta")):
        replay.run("look", (x, tensor), (), lambda launches: seen.append(launches) or ())
    assert len(seen) == 2


def test_the_layout_of_what_was_saved_is_looked_at(starts):
    """Hooks may give the backward copies of the output and the state."""
    attend("keys on chip", {})
    starts.clear()

    def elsewhere(tensor):
        larger = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return larger.view(tensor.shape).copy_(tensor)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, elsewhere):
        attend("keys on chip", {})
    _, backward = starts
    assert any(isinstance(x, torch.Tensor) for x in backward[2])


@pytest.mark.parametrize("again", [False, True])
def test_selective_checkpointing_sees_one_operator(again, starts):
    def keep(*_, **__):
        return CheckpointPolicy.PREFER_SAVE

    for _ in range(1 + again):
        x = torch.randn(2, 3, 40, 16, requires_grad=True)
        output = checkpoint(
            partial(sinkhorn_attention, n_iters=3, backend="triton"), x, x, x, use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, keep),
        )  # fmt: skip
        output.sum().backward()
        assert x.grad is not None


def test_what_is_remembered_holds_no_memory(starts):
    alive = [weakref.ref(tensor) for tensor in attend("streaming", {"mask": True})]
    starts.clear()
    gc.collect()
    assert replay._remembered
    assert not any(reference() for reference in alive)


def test_a_launch_that_is_remembered_starts_what_triton_would(monkeypatch):
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
    memory, constants = torch.zeros(2**14), {"DV": 16, "DVB": 16, "BQ": 16, "DAMPED": False}
    # Tensors that aren't aligned, one that is None, an integer that is 1, and one that is a multiple of 16.
    for offset, with_first, heads, queries in ((0, True, 3, 40), (1, True, 3, 40), (0, False, 3, 40), (0, True, 1, 32)):
        output, grad = (torch.zeros(2**14, dtype=torch.bfloat16)[offset:] for _ in range(2))
        potential = memory[:240]
        arguments = output, grad, potential if with_first else None, potential, potential, potential
        integers = *(1920, 640, 16) * 2, heads, queries, 1
        calls.clear()
        launches = replay.Launches((output, grad, memory))

        def start(launches, first=potential if with_first else None, integers=integers):
            part = launches.given[2][:240]
            tensors = *launches.given[:2], None if first is None else part, part, part, part
            launches.start(streaming_backward.output_cotangents, 6, tensors, integers, warps=4, stages=3, **constants)
            return ()

        launches.first(start)
        launches.again((output, grad, memory))
        streaming_backward.output_cotangents[(6,)](*arguments, *integers, **constants, num_warps=4, num_stages=3)
        noted = [(*call[:2], [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in call[2]]) for call in calls]
        first, again, plain = noted
        assert first == plain
        assert again == plain
