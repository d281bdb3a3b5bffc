"""Expected sliced transport: matchings along many directions, averaged by their costs."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head
from sinkformer_pl.ops.softmax import softmax

_TOKENS = 1024  # in the slices that are taken at once, and at least one slice: short sequences would wait for launches


def sliced_transport(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sort_temperature: float,
    slice_temperature: float,
    scale: float | Tensor = 1.0,
    directions: Tensor | None = None,
    mask: Mask = None,
) -> Tensor:
    """Multiply the expected sliced transport plan of queries and keys, times n, and the values.

    A slice l projects queries and keys to numbers x and y. Its soft permutations are
    A_ij = softmax_j(-(sorted(x)_i - x_j)² / sort_temperature) and B, the same of y; its plan is U_l = Aᵀ B / n, and the
    plan's cost D_l = sum_ij U_l,ij |q_i - k_j|. The weights are n sum_l softmax_l(-D_l / slice_temperature) U_l. At
    `sort_temperature` 0, the limit, A and B are permutations, Aᵀ B matches equal ranks, and no n x n matrix is formed.

    Slices are taken a few at a time, one from 1024 tokens on, and computed again in the backward: the matrices of a few
    are held, not of all.

    Args:
        q: queries (B, H, n, D), any float dtype; computed in at least float32.
        k: keys (B, H, n, D).
        v: values (B, H, n, Dv); with the identity, the result is the weights.
        sort_temperature: of the soft permutations, in squared units of x; at least 0. At 0, tokens of equal x rank in
            their order, and the ranks give no gradient: q, k and `scale` get theirs through the costs alone.
        slice_temperature: of the softmax over slices, in units of the distance; above 0.
        scale: multiplies q·k, as everywhere: queries and keys are multiplied by its square root. A number above 0, or a
            tensor (H,) of such.
        directions: (H, m, D), the projections are inner products with these, at unit length. None is the D features.
        mask: real queries and keys, equally many in a sample; padding is in no plan. `pairs` is refused.

    Returns:
        (B, H, n, Dv) in the dtype of v. The weights are at least 0 and sum to the number of queries in total. Each row
        and each column sums to 1 at `sort_temperature` 0, and only nearly so above it. At padded tokens the result and
        all gradients are exactly 0.

    Raises:
        ValueError: a temperature or scale out of range, shapes that don't fit, or real queries and keys that differ in
            number. Only an eager call on the CPU can count them without waiting; else such a sample gives NaN.
        NotImplementedError: a mask with `pairs`.

    References:
        Shahbazi et al. 2025 (shahbazi2025espformer); Liu et al. 2025 (liu2025expected) for the plan; Prillo and
        Eisenschlos 2020 (prillo2020softsort) for the soft permutations.
    """
    require_temperatures(sort_temperature, slice_temperature)
    mask = mask or AttentionMask()
    _require_shapes(q, k, directions)
    if mask.pairs is not None:
        raise NotImplementedError(
            "SlicedTransport matches equal ranks and can't honour forbidden pairs; use Softmax, or a mask of queries "
            "and keys alone (AttentionMask.from_padding)"
        )
    q, k, v = mask.without_padding(q, k, v)
    with no_autocast(q):
        num_queries, num_keys = mask.query_column(q).sum((-2, -1)), mask.key_row(k.mT).sum((-2, -1))
        _require_equal_counts(num_queries, num_keys)
        root = _square_root(scale, at_least_float32(q).dtype)
        q, k, values = at_least_float32(q) * root, at_least_float32(k) * root, at_least_float32(v)
        x, y = (_project(tokens, directions).mT for tokens in (q, k))
        at_once = max(1, _TOKENS // max(1, q.shape[-2]))
        groups = list(zip(x.split(at_once, -2), y.split(at_once, -2), strict=True))
        cost: Callable[..., Tensor]
        moved: Callable[..., Tensor]
        between: tuple[Tensor, ...]
        matchings: list[tuple[Any, ...]]
        if sort_temperature == 0:
            cost, moved, between = _hard_cost, _hard_moved, (q, k)
            matchings = [(_same_rank(*group, mask),) for group in groups]
        else:
            cost, moved, between = _soft_cost, _soft_moved, (torch.cdist(q, k),)
            matchings = [(*group, mask, sort_temperature) for group in groups]
        totals = torch.cat([_recomputed(cost, *between, *matching) for matching in matchings], -1)
        costs = totals / num_queries.clamp(min=1)[..., None]
        shares = (-costs / slice_temperature).softmax(-1)
        shares = shares.where((num_queries == num_keys)[..., None], torch.nan)
        output = torch.zeros_like(values)
        for share, matching in zip(shares.split(at_once, -1), matchings, strict=True):
            output = output + _recomputed(moved, values, share, *matching)
        return output.to(v.dtype)


def require_temperatures(sort_temperature: float, slice_temperature: float) -> None:
    """Raise a ValueError for a temperature out of range."""
    if not 0 <= sort_temperature < math.inf:
        raise ValueError(f"sort_temperature must be finite and at least 0 (0 sorts hard), got {sort_temperature!r}")
    if not 0 < slice_temperature < math.inf:
        raise ValueError(f"slice_temperature must be finite and above 0, got {slice_temperature!r}")


def _soft_cost(distances: Tensor, x: Tensor, y: Tensor, mask: AttentionMask, temperature: float) -> Tensor:
    """Compute the total distance (B, H, m) under Aᵀ B, of the slices x and y (B, H, m, n)."""
    a, b = _soft_permutation(x, mask.query, temperature), _soft_permutation(y, mask.key, temperature)
    return ((a @ distances[:, :, None]) * b).sum((-2, -1))


def _soft_moved(v: Tensor, shares: Tensor, x: Tensor, y: Tensor, mask: AttentionMask, temperature: float) -> Tensor:
    """Compute Aᵀ B v (B, H, n, Dv), summed over the slices with their shares (B, H, m)."""
    a, b = _soft_permutation(x, mask.query, temperature), _soft_permutation(y, mask.key, temperature)
    return (shares[..., None, None] * (a.mT @ (b @ v[:, :, None]))).sum(2)


def _soft_permutation(x: Tensor, real: Tensor | None, temperature: float) -> Tensor:
    """Make matrices (B, H, m, n, n) of ranks and tokens of x (B, H, m, n); 0 at padding and unused ranks."""
    ranked, mask = x.sort(-1).values, AttentionMask()
    if real is not None:
        mask = AttentionMask(torch.arange(x.shape[-1], device=x.device) < real.sum(-1, keepdim=True), real)
        ranked = x.where(real[:, None, None], math.inf).sort(-1).values
        ranked = ranked.where(ranked.isfinite(), 0.0)
    return softmax(-(ranked[..., :, None] - x[..., None, :]).square() / temperature, mask=mask)


def _hard_cost(q: Tensor, k: Tensor, key_of_query: Tensor) -> Tensor:
    """Compute the total distance (B, H, m) of the matched tokens. Padding is matched to padding, at distance 0."""
    return torch.linalg.vector_norm(q[:, :, None] - _gathered(k, key_of_query), dim=-1).sum(-1)


def _hard_moved(v: Tensor, shares: Tensor, key_of_query: Tensor) -> Tensor:
    """Take the value of each query's key (B, H, n, Dv), summed over the slices with their shares (B, H, m)."""
    return (shares[..., None, None] * _gathered(v, key_of_query)).sum(2)


def _same_rank(x: Tensor, y: Tensor, mask: AttentionMask) -> Tensor:
    """Find for each query of the slices (B, H, m, n) the key of its rank. Padding has the last ranks."""
    query_of_rank, key_of_rank = (
        (tokens if real is None else tokens.where(real[:, None, None], math.inf)).argsort(stable=True, dim=-1)
        for tokens, real in ((x, mask.query), (y, mask.key))
    )
    return torch.zeros_like(key_of_rank).scatter(-1, query_of_rank, key_of_rank)


def _gathered(tokens: Tensor, at: Tensor) -> Tensor:
    """Take tokens (B, H, n, D) in the order of each slice (B, H, m, n)."""
    width, slices = tokens.shape[-1], at.shape[-2]
    return tokens[:, :, None].expand(-1, -1, slices, -1, -1).gather(-2, at[..., None].expand(*at.shape, width))


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function without keeping what its backward needs: that is computed again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _project(tokens: Tensor, directions: Tensor | None) -> Tensor:
    """Return features (B, H, n, D), or their projections (B, H, n, m)."""
    return tokens if directions is None else tokens @ F.normalize(directions.to(tokens.dtype), dim=-1).mT


def _square_root(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    if isinstance(scale, Tensor):
        return per_head(scale.to(dtype).sqrt())
    if not 0 < scale < math.inf:
        raise ValueError(f"SlicedTransport needs a scale above 0, for it takes the square root, got {scale!r}")
    return math.sqrt(scale)


def _require_shapes(q: Tensor, k: Tensor, directions: Tensor | None) -> None:
    if q.shape != k.shape:
        raise ValueError(
            "SlicedTransport matches ranks, so it needs as many queries as keys, of equal width, got q "
            f"{tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if directions is not None and (directions.ndim != 3 or directions.shape[::2] != q.shape[1::2]):
        raise ValueError(f"directions {tuple(directions.shape)} don't fit q {tuple(q.shape)}: they need (H, m, D)")


def _require_equal_counts(num_queries: Tensor, num_keys: Tensor) -> None:
    # Reading the numbers would wait for a GPU and cut a compiled graph in two.
    if num_queries.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not (num_queries == num_keys).all():
        raise ValueError(
            "SlicedTransport matches ranks, so a sample needs as many real queries as real keys, got "
            f"{num_queries.flatten().tolist()} queries and {num_keys.flatten().tolist()} keys"
        )
