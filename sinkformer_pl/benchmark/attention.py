"""Sinkhorn attention against fused softmax attention, the plain loop, and the counted operations."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sinkformer_pl.benchmark import counting
from sinkformer_pl.benchmark.memory import peak_bytes
from sinkformer_pl.benchmark.timing import Times, interleaved
from sinkformer_pl.ops import sinkhorn_attention

WIDTH = 64
HEADS = 8
"""Heads of each sample, where it divides their number."""
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
        device: what it ran on, by name.
        dtype: of the inputs.
        peer: the fused attention: PyTorch's flash kernel on a GPU in half precision, else PyTorch's own choice.
        softmax_ms: its median, in milliseconds.
        sinkhorn_ms: likewise.
        ratio: median over repeats.
        quartiles: of the ratio.
        counted: the operations that the method needs over the time of softmax. On the CPU products, exponentials and
            vector products at the speeds that they reach by themselves on a slice of the problem: no strict bound,
            since slices differ and elementwise passes are left out. On a GPU products and exponentials at the speeds of
            an H100 (`counting`), whatever the card.
        softmax_counted: likewise for softmax attention itself; None on the CPU.
        cudnn: how many times longer cuDNN's softmax attention takes; None where it isn't there, or refuses.
        naive: how many times longer the loop in the log domain under autograd takes than ours; None where not run.
        published: likewise for the published code; None where it isn't given or not run.
        peak_mb: peak memory above the inputs, in 1e6 bytes; None where the system doesn't tell.
        softmax_peak_mb: likewise.
    """

    case: Case
    device: str
    dtype: str
    peer: str
    softmax_ms: float
    sinkhorn_ms: float
    ratio: float
    quartiles: tuple[float, float]
    counted: float
    softmax_counted: float | None
    cudnn: float | None
    naive: float | None
    published: float | None
    peak_mb: float | None
    softmax_peak_mb: float | None

    def as_row(self) -> dict[str, object]:
        """Return it as plain data."""
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
GPU = [
    Case(heads, queries, keys, n_iters)
    for heads, queries, keys in [
        (8192, 65, 65),
        (6144, 128, 128),
        (4096, 197, 197),
        (3072, 256, 256),
        (512, 1000, 16),
        (512, 16, 1000),
        (128, 1024, 1024),
        (32, 4096, 4096),
        (8, 16384, 16384),
    ]
    for n_iters in (3, 21)
]
SUITES = {"dense": DENSE, "streaming": STREAMING, "long": LONG, "gpu": GPU}


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
    generator = torch.Generator(device).manual_seed(0)
    heads = (case.heads // HEADS, HEADS) if case.heads % HEADS == 0 else (1, case.heads)
    shapes = [(*heads, n, WIDTH) for n in (case.queries, case.keys, case.keys)]
    made = {"generator": generator, "device": device, "dtype": dtype}
    inputs = [torch.randn(shape, **made, requires_grad=True) for shape in shapes]  # type: ignore[call-overload]
    upstream = torch.randn(shapes[0], **made)  # type: ignore[call-overload]

    def step(attend: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*inputs), inputs, upstream)

    def sinkhorn_with(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v: sinkhorn_attention(q, k, v, n_iters=case.n_iters, backend=backend)  # type: ignore[arg-type]

    on_gpu = device == "cuda"
    flash = on_gpu and dtype in (torch.float16, torch.bfloat16)
    fused = _softmax_by(SDPBackend.FLASH_ATTENTION) if flash else F.scaled_dot_product_attention
    functions = {"softmax": step(fused), "sinkhorn": step(sinkhorn_with(case.backend))}
    others: dict[str, Callable[[], object]] = {} if on_gpu else _primitives(case, device, dtype)
    if flash and _runs(cudnn := step(_softmax_by(SDPBackend.CUDNN_ATTENTION))):
        others["cudnn"] = cudnn
    times = interleaved(functions | others, repeats=repeats, device=device)
    slow = interleaved(_slow_peers(case, on_gpu, step, sinkhorn_with, published), repeats=2, device=device)
    ratio, low, high = times["sinkhorn"].ratio_to(times["softmax"])
    peaks = [peak_bytes(functions[name], device=device) for name in ("sinkhorn", "softmax")]
    entries = case.heads * case.queries * case.keys
    operations = counting.sinkhorn(case.queries, case.keys, case.n_iters).seconds(entries) if on_gpu else None
    softmax_seconds = times["softmax"].median
    return Result(
        case,
        device=torch.cuda.get_device_name() if on_gpu else platform.machine(),
        dtype=str(dtype).removeprefix("torch."),
        peer="flash" if flash else "fused softmax",
        softmax_ms=1e3 * softmax_seconds,
        sinkhorn_ms=1e3 * times["sinkhorn"].median,
        ratio=ratio,
        quartiles=(low, high),
        counted=(_operations(case, times) if operations is None else operations) / softmax_seconds,
        softmax_counted=counting.SOFTMAX.seconds(entries) / softmax_seconds if on_gpu else None,
        cudnn=times["cudnn"].ratio_to(times["softmax"])[0] if "cudnn" in times else None,
        naive=slow["naive"].median / times["sinkhorn"].median if "naive" in slow else None,
        published=slow["published"].median / times["sinkhorn"].median if "published" in slow else None,
        peak_mb=None if peaks[0] is None else peaks[0] / 1e6,
        softmax_peak_mb=None if peaks[1] is None else peaks[1] / 1e6,
    )


def _slow_peers(
    case: Case,
    on_gpu: bool,
    step: Callable[[Callable[..., Tensor]], Callable[[], object]],
    sinkhorn_with: Callable[[str], Callable[..., Tensor]],
    published: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None,
) -> dict[str, Callable[[], object]]:
    """Time the loop in the log domain under autograd, and the published code, where they have time and memory."""
    peers: dict[str, Callable[[], object]] = {}
    smallest, largest = sorted((case.queries, case.keys))
    if not on_gpu and NAIVE_FROM <= smallest <= 2 * NAIVE_FROM:
        peers["naive"] = step(sinkhorn_with("reference"))
    if published is not None and largest <= 2 * NAIVE_FROM:
        peers["published"] = step(
            lambda *qkv: published(*(x.flatten(0, 1) for x in qkv), case.n_iters).view_as(qkv[0])  # type: ignore[call-arg]
        )
    return peers


def _softmax_by(backend: SDPBackend) -> Callable[..., Tensor]:
    """Make softmax attention by one of PyTorch's backends; its backward is the same one's."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _runs(function: Callable[[], object]) -> bool:
    """Tell whether PyTorch has a kernel for it; it says so by a RuntimeError."""
    try:
        function()
    except RuntimeError:
        return False
    return True


def _primitives(case: Case, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Make the operations that every method consists of, on a slice of the problem that stays in the cache."""
    heads, rows = _slice(case)
    q, k = (torch.randn(heads, n, WIDTH, device=device, dtype=dtype) for n in (rows, case.keys))
    scores, vector = torch.randn(heads, rows, case.keys, device=device, dtype=dtype), q[..., :1].mT.contiguous()
    return {
        "product": lambda: torch.bmm(q, k.mT, out=scores),
        "exponential": lambda: scores.clamp_(-1, 0).exp2_(),
        "vector": lambda: torch.bmm(vector, scores),
    }


def _slice(case: Case) -> tuple[int, int]:
    """Choose the heads and queries of a part that stays in the cache, and that threads can divide."""
    rows = max(1, min(case.queries, max(128, 2**20 // (4 * case.keys))))
    return max(2, min(case.heads, 2**20 // (4 * rows * case.keys))), rows


def _operations(case: Case, times: dict[str, Times]) -> float:
    """Compute the seconds of the counted operations of forward and backward."""
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
