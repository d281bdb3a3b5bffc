"""Sinkhorn attention against fused softmax attention, the plain loop, and the counted operations."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor

from sinkformer_pl.benchmark.memory import peak_bytes
from sinkformer_pl.benchmark.timing import Times, interleaved
from sinkformer_pl.ops import sinkhorn_attention

WIDTH = 64
NAIVE_FROM = 1024


@dataclass(frozen=True)
class Case:
    """One shape; heads is batch times heads.

    Attributes:
        heads: number of independent problems.
        queries: Q.
        keys: K.
        n_iters: half-steps.
        backend: of `sinkhorn_attention`.
    """

    heads: int
    queries: int
    keys: int
    n_iters: int
    backend: str = "auto"


@dataclass(frozen=True)
class Result:
    """Forward and backward of one case; ratios are to fused softmax attention in the same repeat.

    Attributes:
        case: the shape.
        softmax_ms: median, in milliseconds.
        sinkhorn_ms: likewise.
        ratio: median over repeats.
        quartiles: of the ratio.
        counted: the products, exponentials and vector products that the method needs, at the speeds that they reach by
            themselves on a slice of the problem, over the time of softmax. No strict bound: slices differ, elementwise
            passes are left out.
        naive: how many times longer the loop in the log domain under autograd takes than ours; None where not run.
        published: likewise for the published code; None where it isn't given or not run.
        peak_mb: peak memory above the inputs, in 1e6 bytes; None where the system doesn't tell.
        softmax_peak_mb: likewise.
    """

    case: Case
    softmax_ms: float
    sinkhorn_ms: float
    ratio: float
    quartiles: tuple[float, float]
    counted: float
    naive: float | None
    published: float | None
    peak_mb: float | None
    softmax_peak_mb: float | None

    def as_row(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


DENSE = [
    Case(heads, queries, keys, n_iters)
    for heads, queries, keys in [
        (8, 1024, 1024),
        (4, 2048, 2048),
        (64, 256, 256),
        (16, 512, 512),
        (256, 65, 65),
        (64, 1000, 16),
        (64, 16, 1000),
    ]
    for n_iters in (3, 21)
]
STREAMING = [Case(1, n, n, n_iters, "streaming") for n in (4096, 8192) for n_iters in (3, 7)]
LONG = [Case(1, 32768, 32768, 3, "streaming")]
SUITES = {"dense": DENSE, "streaming": STREAMING, "long": LONG}


def measure(
    case: Case,
    *,
    repeats: int,
    device: str,
    dtype: torch.dtype,
    published: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None,
) -> Result:
    """Time one case, forward and backward.

    Args:
        case: what to measure.
        repeats: interleaved repeats; the slow peers get two.
        device: "cpu" or "cuda".
        dtype: of the inputs.
        published: the attention of the published code, see `Published.attend`.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(case.heads, n, WIDTH) for n in (case.queries, case.keys, case.keys)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)

    def step(attend: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*inputs), inputs, upstream)

    def sinkhorn_with(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v: sinkhorn_attention(q, k, v, n_iters=case.n_iters, backend=backend)  # type: ignore[call-overload]

    functions = {"softmax": step(_softmax), "sinkhorn": step(sinkhorn_with(case.backend))}
    naive = NAIVE_FROM <= min(case.queries, case.keys) <= 2 * NAIVE_FROM
    times = interleaved(functions | _primitives(case, device, dtype), repeats=repeats, device=device)
    peers: dict[str, Callable[[], object]] = {"naive": step(sinkhorn_with("reference"))} if naive else {}
    if published is not None and max(case.queries, case.keys) <= 2 * NAIVE_FROM:
        peers["published"] = step(lambda q, k, v: published(q, k, v, case.n_iters))
    slow = interleaved(peers, repeats=2, device=device)
    ratio, low, high = times["sinkhorn"].ratio_to(times["softmax"])
    peaks = [peak_bytes(functions[name], device=device) for name in ("sinkhorn", "softmax")]
    return Result(
        case,
        softmax_ms=1e3 * times["softmax"].median,
        sinkhorn_ms=1e3 * times["sinkhorn"].median,
        ratio=ratio,
        quartiles=(low, high),
        counted=_operations(case, times) / times["softmax"].median,
        naive=slow["naive"].median / times["sinkhorn"].median if "naive" in slow else None,
        published=slow["published"].median / times["sinkhorn"].median if "published" in slow else None,
        peak_mb=None if peaks[0] is None else peaks[0] / 1e6,
        softmax_peak_mb=None if peaks[1] is None else peaks[1] / 1e6,
    )


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # The fused operators take four axes.
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def _primitives(case: Case, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The operations that every method is made of, on a slice of the problem that stays in the cache."""
    heads, rows = _slice(case)
    q, k = (torch.randn(heads, n, WIDTH, device=device, dtype=dtype) for n in (rows, case.keys))
    scores, vector = torch.randn(heads, rows, case.keys, device=device, dtype=dtype), q[..., :1].mT.contiguous()
    return {
        "product": lambda: torch.bmm(q, k.mT, out=scores),
        "exponential": lambda: scores.clamp_(-1, 0).exp2_(),
        "vector": lambda: torch.bmm(vector, scores),
    }


def _slice(case: Case) -> tuple[int, int]:
    """Heads and queries of a part that stays in the cache, and that threads can divide."""
    rows = max(1, min(case.queries, max(128, 2**20 // (4 * case.keys))))
    return max(2, min(case.heads, 2**20 // (4 * rows * case.keys))), rows


def _operations(case: Case, times: dict[str, Times]) -> float:
    """Seconds of the counted operations of forward and backward."""
    heads, rows = _slice(case)
    share = case.heads * case.queries / (heads * rows)
    pairs = case.n_iters // 2
    if case.backend == "streaming":
        # Forward: scores and exponential of each pass, the values. Backward: the values, each pair, then the gradients.
        products, exponentials, vectors = 8 + 2 * pairs + case.n_iters / WIDTH, 3 + 2 * pairs, 4 * pairs
    else:
        products, exponentials, vectors = 7 + case.n_iters / WIDTH, 2, 2 * (case.n_iters - 1)
    return share * (
        products * times["product"].median
        + exponentials * times["exponential"].median
        + vectors * times["vector"].median
    )
