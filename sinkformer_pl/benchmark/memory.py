"""Peak memory of a call, above what is held before it."""

import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from sinkformer_pl.ops.sinkhorn_attention.workspace import release

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_bytes(function: Callable[[], object], *, device: str) -> int | None:
    """Measure the highest point during a call above the level before it, in bytes.

    On a GPU as PyTorch counts them; on Linux from the kernel's high-water mark, which can be set back; elsewhere None.
    """
    # What earlier calls left for later ones would hide what this one takes.
    release()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return None
    try:
        # Nor should what the allocator holds back.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    before = _kilobytes("VmRSS")
    function()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
