"""What the compiler makes of each kernel at each class of sizes, for four generations of GPUs, without one."""

import contextlib
import importlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs

triton = pytest.importorskip("triton", reason="Triton isn't installed: there are no kernels to compile")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource
problem, attention, *KERNELS = (
    importlib.import_module(f"sinkformer_pl.ops.sinkhorn_attention.gpu.{name}")
    for name in (
        "problem", "attention", "keys_on_chip", "queries_on_chip", "on_chip", "streaming_forward", "streaming_backward"
    )
)  # fmt: skip

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Bytes of shared memory that one program may have, of an A100, a 3090 or A10, a 4090 or L4, an H100.
LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


@contextlib.contextmanager
def recorded(limit: int) -> Iterator[list]:
    """Note the calls of kernels in the place of making them, on a device with this limit."""
    calls: list = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((self.kernel, arguments, constants))

    with pytest.MonkeyPatch.context() as patch:
        for module in KERNELS:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, triton.runtime.jit.JITFunction) and kernel.fn.__module__ == module.__name__:
                    patch.setattr(module, name, Recorder(kernel))
        patch.setattr(problem, "shared_memory", lambda device: limit)
        yield calls


def resources(kernel, arguments, constants, architecture) -> dict[str, int]:
    """Return shared memory, registers a thread, and bytes of stack a thread (spills), as compiled."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature, fixed, aligned = {}, dict(constants), {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name], aligned[(place,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel, signature={name: signature[name] for name in kernel.arg_names}, constexprs=fixed, attrs=aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    line = next(line for line in printed.splitlines() if "REG:" in line)
    read = {name: int(line.split(f"{name}:")[1].split()[0]) for name in ("REG", "STACK")}
    return {"shared": compiled.metadata.shared, "registers": read["REG"], "stack": read["STACK"]}


# Queries, keys, width, half-steps: each class of sizes of the table of choices.
CLASSES = {
    torch.bfloat16: [
        (128, 128, 64, 3), (256, 256, 64, 21), (100, 100, 128, 3), (1000, 16, 64, 3), (16, 1000, 64, 3),
        (128, 1000, 128, 3), (256, 1000, 64, 3), (128, 128, 64, 21), (1024, 1024, 64, 3), (1024, 1024, 128, 3),
        (1024, 1024, 256, 3),
    ],
    torch.float32: [(65, 65, 64, 3), (60, 60, 64, 21), (128, 1000, 64, 3), (1024, 1024, 64, 3), (1024, 1024, 256, 3)],
}  # fmt: skip
FEATURES = {"plain": (False, False, False), "everything": (True, True, True)}


def kernels_of(size, dtype, limit, features):
    """Return the calls of forward and backward, each kernel once."""
    queries, keys, width, n_iters = size
    masked, damped, biased = features

    def tokens(n):
        return torch.empty(2, n, 3, width, dtype=dtype).transpose(1, 2)

    x = OperatorInputs(
        tokens(queries), tokens(keys), tokens(keys),
        torch.empty(2, 3, queries, keys) if biased else None,
        torch.empty(2, 1, queries).expand(2, 3, -1) if masked else None,
        torch.empty(2, 1, keys).expand(2, 3, -1) if masked else None,
        torch.empty(2, 3) if masked else None, torch.empty(2, 3) if damped else None,
        1.0 if masked else 0.125, 1.0, n_iters, "unrolled", "triton",
    )  # fmt: skip
    wanted = ["bias"] * biased + ["scale", "lam", "log_row"] * masked
    with recorded(limit) as calls:
        output, memory = attention.forward(x)
        attention.backward(x, output, memory, output, wanted)
    seen = {}
    for kernel, arguments, constants in calls:
        seen[kernel.fn.__module__, kernel.fn.__name__, tuple(value is None for value in arguments)] = (
            kernel, arguments, constants,
        )  # fmt: skip
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "features"), [*((architecture, "plain") for architecture in LIMITS), (86, "everything")]
)
def test_every_kernel_fits(architecture, features):
    if not TOOL.exists():
        pytest.skip("this build of Triton brings no cuobjdump")
    rows, wrong = [], []
    dtypes = CLASSES if features == "plain" else {torch.bfloat16: CLASSES[torch.bfloat16][::2]}
    for dtype, sizes in dtypes.items():
        for size in sizes:
            for (module, name, _), call in kernels_of(size, dtype, LIMITS[architecture], FEATURES[features]).items():
                used = resources(*call[:2], dict(call[2]), architecture)
                row = f"sm_{architecture} {features} {size} {dtype} {module.split('.')[-1]}.{name}: {used}"
                rows.append(row)
                if used["shared"] > LIMITS[architecture] or used["registers"] > 255:
                    wrong.append(row)
    if report := os.environ.get("SINKFORMER_KERNEL_REPORT"):
        with Path(report).open("a") as file:
            file.write("\n".join(rows) + "\n")
    assert rows
    assert not wrong, "\n".join(wrong)
