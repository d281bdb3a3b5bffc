"""Start a kernel without looking at every argument anew."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

KEPT = 4096
"""Kinds of calls that are remembered; each is a tuple of the arguments' types and numbers."""

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def start(kernel: Any, programs: int, *arguments: Any, warps: int, stages: int, **constants: Any) -> None:
    """Start programs of a kernel on the device of its first argument.

    Triton compiles a kernel for the dtypes and the alignment of tensors, for tensors that are None, and for whether
    integers are 1 or multiples of 16, and derives these from every argument at every call. With 70 arguments that takes
    longer than a small kernel runs, so that a call like an earlier one starts what was compiled for that.

    Args:
        kernel: a function under `triton.jit`.
        programs: their number, one axis.
        *arguments: tensors, None and numbers, in the order of the kernel; the first one is a tensor.
        warps: of a program.
        stages: of the pipeline of a loop.
        **constants: the other parameters of the kernel.
    """
    device = arguments[0].device
    call = (
        kernel, device.index, warps, stages, *constants.values(),
        *[(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x for x in arguments],
    )  # fmt: skip
    with _on(device):
        found = _compiled.get(call)
        if found is not None:
            compiled, tail = found
            compiled[programs, 1, 1](*arguments, *tail)
            return
        compiled = kernel[programs,](*arguments, **constants, num_warps=warps, num_stages=stages)
        if compiled is not None:  # as it is where kernels are interpreted
            if len(_compiled) == KEPT:
                _compiled.clear()
            _compiled[call] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device."""
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(device)
