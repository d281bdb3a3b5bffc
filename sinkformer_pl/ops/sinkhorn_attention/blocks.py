"""Blocks of heads, and the threads that work on them."""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.kernel import TILE_BYTES
from sinkformer_pl.ops.sinkhorn_attention.threads import Member, together

BLOCK_BYTES = 2**21
"""Size of the kernel matrices that one thread works on together.

Smaller ones stay in a nearer cache between half-steps, but are more operations to start, at which threads take turns.
"""

GPU_BLOCK_BYTES = 2**28
"""Size of the kernel matrices that a GPU works on together."""

ALONE_BYTES = 2**21
"""Size of all kernel matrices up to which the caller's thread works alone.

To start operations so short takes most of their time, and threads of Python take turns at that.
"""

SHARED_BYTES = TILE_BYTES
"""Size of a kernel matrix from which on all threads work on one head."""

MIN_ROWS = 128
"""Queries that a thread should have at the least where threads share those of one head."""


def each_block(q: Tensor, k: Tensor, work: Callable[[slice, slice, Member], None]) -> None:
    """Call `work` with heads, queries and the member of a team that a thread is, until all is done.

    A block of heads is the work of one thread. Of large heads, and of what is left over, each thread has a part of the
    queries. Blocks depend on shapes and the number of threads alone, and not on who is the faster.

    Args:
        q: (N, Q, D).
        k: (N, K, D).
        work: called from several threads at once, without gradients.
    """
    (heads, queries), on_cpu = q.shape[:2], q.device.type == "cpu"
    matrix = max(1, queries * k.shape[1] * q.element_size())
    threads = torch.get_num_threads() if on_cpu and heads * matrix > ALONE_BYTES else 1
    size = max(1, (BLOCK_BYTES if on_cpu else GPU_BLOCK_BYTES) // matrix)
    size = math.ceil(heads / threads / math.ceil(heads / threads / size))
    shared = 0
    if threads > 1 and queries >= threads * MIN_ROWS:
        shared = heads if matrix > SHARED_BYTES else heads % threads if size == 1 else 0
    blocks = deque(slice(start, min(start + size, heads)) for start in range(shared, heads, size))

    def run(member: Member) -> None:
        start, stop = (queries * rank // member.size for rank in (member.rank, member.rank + 1))
        for head in range(shared):
            work(slice(head, head + 1), slice(start, stop), member)
        while True:
            try:
                block = blocks.popleft()
            except IndexError:
                return
            work(block, slice(None), Member())

    together(threads if shared else min(threads, len(blocks)), run)
