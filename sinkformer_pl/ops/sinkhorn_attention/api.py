"""Sinkhorn attention: the plan of Sinkhorn's algorithm times the values, forward and backward."""

import math
from typing import Literal, NamedTuple, get_args, overload

from torch import Tensor

from sinkformer_pl.ops.forbidden import forbid
from sinkformer_pl.ops.marginals import uniform_marginals
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head
from sinkformer_pl.ops.sinkhorn import require_half_steps, require_lam
from sinkformer_pl.ops.sinkhorn_attention.closed_form import closed_form_attention
from sinkformer_pl.ops.sinkhorn_attention.problem import Gradient, Problem
from sinkformer_pl.ops.sinkhorn_attention.reference import reference_attention

KEPT_BYTES = 2**28
"""Size of a head's kernel matrix up to which "auto" is the dense backend."""

Backend = Literal["auto", "reference", "dense", "streaming"]


class SinkhornInfo(NamedTuple):
    """How the plan came out; detached.

    Attributes:
        f: (..., Q), potential of the queries, at least float32; 0 at padding.
        g: (..., K), potential of the keys, likewise; the plan is exp(scores + f + g).
        residual: (...), as `marginal_error` of the plan.
    """

    f: Tensor
    g: Tensor
    residual: Tensor


@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    n_iters: int = 3,
    mask: AttentionMask | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    lam: float | Tensor = 1.0,
    gradient: Gradient = "unrolled",
    backend: Backend = "auto",
    return_info: Literal[False] = False,
) -> Tensor: ...


@overload
def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    n_iters: int = 3,
    mask: AttentionMask | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    lam: float | Tensor = 1.0,
    gradient: Gradient = "unrolled",
    backend: Backend = "auto",
    return_info: Literal[True],
) -> tuple[Tensor, SinkhornInfo]: ...


def sinkhorn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    n_iters: int = 3,
    mask: AttentionMask | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    lam: float | Tensor = 1.0,
    gradient: Gradient = "unrolled",
    backend: Backend = "auto",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """Attention whose weights are `sinkhorn(scale * query @ key^T + bias, n_iters)`.

    Args:
        query: (..., Q, D), of any float dtype; computed in at least float32, autocast or not. The first of the leading
            axes is the sample; a 2-D input is one sample.
        key: (..., K, D), the same leading axes and dtype.
        value: (..., K, Dv), likewise.
        n_iters: half-steps, rows first; 1 is softmax. Odd counts end on rows, so that rows sum to 1 exactly.
        mask: real queries (B, Q) and keys (B, K). What padding holds, if finite, changes nothing; `pairs` is refused.
        bias: added to the scaled scores, broadcastable to (..., Q, K), differentiable. Entries of -inf, or at or below
            -1e9, forbid their pair (`forbid`); what can't be reached with these zeros shows in `marginal_error`.
        scale: of the scores, a number or a tensor (H,) of one a head (axis -3), differentiable; default 1/sqrt(D).
        lam: damping of the column step in [0, 1], a number or a tensor (H,), differentiable; see `sinkhorn`.
        gradient: "unrolled", exact for these half-steps; "implicit", of the converged plan, at a cost that doesn't
            depend on `n_iters` and with an error of the order of the residual; "detached", with the potential of the
            keys held constant, as in the text experiments of Sander et al. 2022.
        backend: "reference", the loop in the log domain under autograd, an oracle; "dense", a block of heads at a time
            with its backward in closed form; "streaming", the same in memory O(Q + K) and one tile of scores, without
            a bias; "auto" is "dense", which is faster at every size, up to a kernel matrix of 256 MiB a head, and
            "streaming" from there on where there is no bias.
        return_info: also return potentials and residual.

    Returns:
        (..., Q, Dv) in the dtype of the inputs, 0 at padded queries and where a sample has no key; with
        `return_info` also a `SinkhornInfo`.

    Raises:
        ValueError: shapes, dtypes or arguments that don't fit.
        NotImplementedError: a mask with `pairs`; a bias in the streaming backend.
        RuntimeError: on a second derivative, of all but the reference.

    References:
        Sander et al. 2022 (sander2022sinkformers); docs/fast_attention.md derives the closed form.
    """
    _check(query, key, value, gradient, backend)
    if not (query.numel() and key.numel()):
        return _without_tokens(query, key, value, return_info)
    with no_autocast(query):
        problem = _problem(query, key, value, n_iters, mask or AttentionMask(), bias, scale, lam, gradient)
        problem = problem._replace(with_info=return_info, kept=_kept(problem, backend))
        solve = reference_attention if backend == "reference" else closed_form_attention
        output, f, g, residual = solve(problem)
    leading = query.shape[:-2]
    output = output.reshape(*leading, query.shape[-2], value.shape[-1]).to(query.dtype)
    if f is None or g is None or residual is None:
        return output
    f, g = f.reshape(*leading, query.shape[-2]), g.reshape(*leading, key.shape[-2])
    return output, SinkhornInfo(f, g, residual.reshape(leading))


def _without_tokens(
    query: Tensor, key: Tensor, value: Tensor, return_info: bool
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """Attend from no query or to no key: zeros, of which the gradients are zeros."""
    output = (query @ key.mT) @ value
    if not return_info:
        return output
    f, g = (at_least_float32(tensor.detach()).new_zeros(tensor.shape[:-1]) for tensor in (query, key))
    return output, SinkhornInfo(f, g, f.new_zeros(query.shape[:-2]))


def _kept(p: Problem, backend: str) -> bool:
    """Whether the dense backend is asked for, or for "auto" not too large."""
    if backend == "auto":
        return p.bias is not None or p.q.shape[1] * p.k.shape[1] * p.q.element_size() <= KEPT_BYTES
    if backend == "streaming" and p.bias is not None:
        raise NotImplementedError("the streaming backend takes no bias, which is as large as the scores; use 'dense'")
    return backend != "streaming"


def _check(query: Tensor, key: Tensor, value: Tensor, gradient: str, backend: str) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if min(query.ndim, key.ndim, value.ndim) < 2 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(f"query, key and value need the same leading axes, then (tokens, features): got {shapes}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(f"query and key need one width, key and value one number of tokens: got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value need one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    for name, chosen, valid in (("gradient", gradient, get_args(Gradient)), ("backend", backend, get_args(Backend))):
        if chosen not in valid:
            raise ValueError(f"{name} must be one of {', '.join(valid)}, got {chosen!r}")


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_iters: int,
    mask: AttentionMask,
    bias: Tensor | None,
    scale: float | Tensor | None,
    lam: float | Tensor,
    gradient: Gradient,
) -> Problem:
    """Canonical form: one leading axis, at least float32, zeros at padding, a scale of each head in the queries."""
    require_half_steps(n_iters)
    require_lam(lam)
    if gradient == "implicit" and n_iters < 2:
        raise ValueError("gradient='implicit' needs n_iters of at least 2: one half-step has no column step")
    leading, queries, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    # Marginals and masks look at the shape of the scores alone, which are not formed.
    like_scores = at_least_float32(query.new_empty(())).expand(*leading, queries, keys)
    unmasked = mask.query is mask.key is None
    bias, mask = forbid(bias, mask, like_scores)
    query, key, value = mask.without_padding(*(at_least_float32(tensor) for tensor in (query, key, value)))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if isinstance(scale, Tensor):
        query, scale = query * per_head(scale.to(query.dtype)), 1.0
    rows = columns = None
    log_ratio: float | Tensor = math.log(max(queries, 1) / max(keys, 1))
    if not (mask.query is mask.key is mask.pairs is None):
        _, log_column, rows, columns = uniform_marginals(like_scores, mask)
        log_ratio = log_column[..., :1].expand(*leading, 1, 1).reshape(-1, 1, 1)
    if rows is not None and columns is not None:
        rows = rows.expand(*leading, queries, 1).reshape(-1, queries, 1)
        columns = columns.expand(*leading, 1, keys).reshape(-1, keys, 1)
    if bias is not None:
        given, bias = bias, bias.to(query.dtype).expand(*leading, queries, keys).reshape(-1, queries, keys)
        if rows is not None and columns is not None:
            # A query or key without a pair left in its head has no mass there.
            if unmasked and given.ndim > 1:
                # What is removed is forbidden to all, so the bias says it all, in its own shape, which may be small.
                closed = given.isneginf()
                idle = closed.all(-1, keepdim=True), closed.all(-2, keepdim=True)
                rows = rows & ~idle[0].expand(*leading, queries, 1).reshape(-1, queries, 1)
                columns = columns & ~idle[1].expand(*leading, 1, keys).reshape(-1, 1, keys).mT
            else:
                met = rows & columns.mT & ~bias.isneginf()
                rows, columns = met.any(-1, keepdim=True), met.any(-2, keepdim=True).mT
    if isinstance(lam, Tensor):
        lam = lam.to(query.dtype).reshape(*lam.shape, 1, 1).expand(*leading, 1, 1).reshape(-1, 1, 1)
    return Problem(
        query.reshape(-1, *query.shape[-2:]),
        key.reshape(-1, *key.shape[-2:]),
        value.reshape(-1, *value.shape[-2:]),
        scale,
        bias,
        rows,
        columns,
        log_ratio,
        None if isinstance(lam, int | float) and lam == 1 else lam,
        n_iters,
        gradient,
        with_info=False,
        kept=True,
    )
