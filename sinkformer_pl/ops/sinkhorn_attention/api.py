"""Sinkhorn attention: the plan of Sinkhorn's algorithm times the values, forward and backward."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sinkformer_pl.ops.forbidden import forbid
from sinkformer_pl.ops.marginals import Marginals, given_marginals, only, uniform_log_marginals, uniform_marginals
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head
from sinkformer_pl.ops.sinkhorn import Plan, require_half_steps, require_lam
from sinkformer_pl.ops.sinkhorn_attention import gpu
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs
from sinkformer_pl.ops.sinkhorn_attention.operator import attend, attend_with_info
from sinkformer_pl.ops.sinkhorn_attention.problem import Gradient
from sinkformer_pl.ops.sinkhorn_attention.reference import reference_attention

NO_POTENTIAL = 1e29
"""A potential of this size stands for an infinite one."""

Backend = Literal["auto", "reference", "dense", "streaming", "triton"]
BACKENDS, GRADIENTS = get_args(Backend), get_args(Gradient)


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
    row_marginal: Tensor | None = None,
    column_marginal: Tensor | None = None,
    gradient: Gradient = "unrolled",
    backend: Backend = "auto",
    return_info: bool = False,
) -> Any:
    """Attention whose weights are `sinkhorn(scale * query @ key^T + bias, n_iters)`.

    Args:
        query: (..., Q, D), of any float dtype; computed in at least float32, autocast or not. The first of the leading
            axes is the sample; a 2-D input is one sample.
        key: (..., K, D), the same leading axes and dtype.
        value: (..., K, Dv), likewise.
        n_iters: half-steps, rows first; 1 is softmax. Odd counts end on rows, so that rows sum to 1 exactly.
        mask: real queries (B, Q) and keys (B, K). What padding holds, if finite, changes nothing; `pairs` is refused.
        bias: added to the scaled scores, broadcastable to (..., Q, K), differentiable. An entry at or below -1e9, or
            -inf, forbids its pair; a key that is forbidden to all leaves the marginals, see `ops.forbid`.
        scale: of the scores, a number or a tensor (H,) of one a head (axis -3), differentiable; default 1/sqrt(D).
        lam: damping of the column step in [0, 1], a number or a tensor (H,), differentiable; see `sinkhorn`.
        row_marginal: (..., Q) sums of the rows, as of `sinkhorn`, differentiable; both marginals or neither.
        column_marginal: (..., K) sums of the columns, likewise.
        gradient: "unrolled", exact for these half-steps; "implicit", of the converged plan, at a cost that doesn't
            depend on `n_iters` and with an error of the order of the residual; "detached", with the potential of the
            keys held constant, as in the text experiments of Sander et al. 2022.
        backend: "reference", the loop in the log domain under autograd, an oracle; "dense", a block of heads at a time
            with its backward in closed form; "streaming", the same in memory O(Q + K) and one tile of scores, without
            a bias; "triton", kernels for GPUs, in float32 (without TF32 unless PyTorch's matrix products use it),
            bfloat16 and float16 with up to 256 features, and in memory O(Q + K). "auto" is "triton" on CUDA where these
            kernels can run (`gpu.available`); elsewhere "dense", which is faster at every size, up to a kernel matrix
            of 256 MiB a head, and "streaming" from there on where there is no bias.
        return_info: also return potentials and residual.

    Returns:
        (..., Q, Dv) in the dtype of the inputs, 0 at padded queries and where a sample has no key; with
        `return_info` (output, `SinkhornInfo`).

    Raises:
        ValueError: shapes, dtypes or arguments that don't fit.
        NotImplementedError: a mask with `pairs`; a bias in the streaming backend; what the backend "triton" can't run.
        RuntimeError: on a second derivative, of all but the reference.

    References:
        Sander et al. 2022 (sander2022sinkformers); docs/fast_attention.md derives the closed form.
    """
    _check(query, key, value, gradient, backend)
    require_half_steps(n_iters)
    require_lam(lam)
    if gradient == "implicit" and n_iters < 2:
        raise ValueError("gradient='implicit' needs n_iters of at least 2: one half-step has no column step")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    given = mask or AttentionMask()
    whole = all(x is None for x in (given.query, given.key, given.pairs, bias, row_marginal, column_marginal))
    if whole and backend != "reference" and not return_info:
        # The operator knows the uniform marginals of whole samples: making them would take two kernels a call.
        x = _operator_inputs(query, key, value, None, None, None, scale, lam, n_iters, gradient, backend)
        return _with_axes_of(query, attend(x))
    # Functions of shapes alone take it in the place of the scores, which are not formed.
    like_scores = query.new_empty(()).expand(*query.shape[:-1], key.shape[-2])
    bias, mask = forbid(bias, mask, like_scores)
    if row_marginal is None and column_marginal is None and backend != "reference" and not return_info:
        logs = uniform_log_marginals(like_scores, mask)
        x = _operator_inputs(query, key, value, bias, *logs, scale, lam, n_iters, gradient, backend)
        return _with_axes_of(query, attend(x))
    marginals = _marginals(like_scores, given, mask, row_marginal, column_marginal)
    if backend == "reference":
        with no_autocast(query):
            q, k, v = mask.without_padding(*(at_least_float32(tensor) for tensor in (query, key, value)))
            scaled = q * (per_head(scale.to(q.dtype)) if isinstance(scale, Tensor) else scale)
            damping = per_head(lam.to(q.dtype)) if isinstance(lam, Tensor) else lam
            output, plan = reference_attention(scaled, k, v, bias, marginals, damping, n_iters, gradient)
            output = output.to(query.dtype)
            plan = Plan(*(tensor.detach() for tensor in plan))
            found: tuple[Tensor, ...] = (plan.f[..., 0], plan.g[..., 0, :], plan.weights.sum(-1), plan.weights.sum(-2))
    else:
        log_row = log_column = None
        if row_marginal is not None or marginals.rows is not None:
            log_row, log_column = _log(marginals.log_row, marginals.rows), _log(marginals.log_column, marginals.columns)
        x = _operator_inputs(query, key, value, bias, log_row, log_column, scale, lam, n_iters, gradient, backend)
        if not return_info:
            return _with_axes_of(query, attend(x))
        output, parts = attend_with_info(x)
        output, leading = _with_axes_of(query, output), query.shape[:-2]
        found = tuple(part.reshape(*leading, part.shape[-1]) for part in parts)
    return (output, _info(marginals, *found)) if return_info else output


def _with_axes_of(query: Tensor, output: Tensor) -> Tensor:
    """Undo the form of the operator."""
    return output if query.ndim == 4 else output.reshape(*query.shape[:-1], output.shape[-1])


def _marginals(
    like_scores: Tensor, given: AttentionMask, mask: AttentionMask, row: Tensor | None, column: Tensor | None
) -> Marginals:
    """Take marginals as given, for the mask as given, or make uniform ones without the keys that nobody may meet."""
    if row is not None and column is not None:
        return given_marginals(like_scores, given, row, column)
    if row is not None or column is not None:
        raise ValueError("give both row_marginal and column_marginal, or neither: their totals must be equal")
    return uniform_marginals(like_scores, mask)


def _info(marginals: Marginals, f: Tensor, g: Tensor, row_sums: Tensor, column_sums: Tensor) -> SinkhornInfo:
    rows = None if marginals.rows is None else marginals.rows[..., 0]
    columns = None if marginals.columns is None else marginals.columns[..., 0, :]
    row, column = marginals.log_row.detach().exp()[..., 0], marginals.log_column.detach().exp()[..., 0, :]
    errors = only((row_sums / row - 1).abs(), rows), only((column_sums / column - 1).abs(), columns)
    if not f.shape[-1] or not g.shape[-1]:
        residual = f.new_zeros(f.shape[:-1])
    else:
        residual = torch.maximum(errors[0].amax(-1), errors[1].amax(-1))
    return SinkhornInfo(
        _finite(f, rows).expand(row_sums.shape), _finite(g, columns).expand(column_sums.shape), residual
    )


def _finite(potential: Tensor, places: Tensor | None) -> Tensor:
    """0 without mass, and where forbidden pairs have left none."""
    return only(potential.where(potential.abs() < NO_POTENTIAL, 0.0), places)


def _operator_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_column: Tensor | None,
    scale: float | Tensor,
    lam: float | Tensor,
    n_iters: int,
    gradient: Gradient,
    backend: Backend,
) -> OperatorInputs:
    """Bring all to one axis of samples and one of heads."""
    leading, queries, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    samples, heads = (leading[0] if leading else 1), math.prod(leading[1:])
    exact = torch.promote_types(query.dtype, torch.float32)

    def by_head(tensor: Tensor, *shape: int) -> Tensor:
        whole = tensor.to(exact).expand(*leading, *shape)
        return whole if len(leading) == 2 else whole.reshape(samples, heads, *shape)

    q, k, v = (
        tensor if len(leading) == 2 else tensor.reshape(samples, heads, *tensor.shape[-2:])
        for tensor in (query, key, value)
    )
    return OperatorInputs(
        q,
        k,
        v,
        None if bias is None else by_head(bias, queries, keys),
        None if log_row is None else by_head(log_row[..., 0], queries),
        None if log_column is None else by_head(log_column[..., 0, :], keys),
        by_head(scale) if isinstance(scale, Tensor) else None,
        by_head(lam) if isinstance(lam, Tensor) else None,
        1.0 if isinstance(scale, Tensor) else float(scale),
        1.0 if isinstance(lam, Tensor) else float(lam),
        n_iters,
        gradient,
        _backend(q, v, bias, backend),
    )


def _log(log: Tensor, places: Tensor | None) -> Tensor:
    """The logarithm of a marginal, -inf without mass."""
    return log if places is None else log.where(places, -torch.inf)


def _backend(q: Tensor, v: Tensor, bias: Tensor | None, backend: Backend) -> str:
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = gpu.reason_against(q, v)
        if reason is None:
            return "triton"
        if backend == "triton":
            raise NotImplementedError(f"backend='triton': {reason}; use backend='auto'")
    if backend == "streaming" and bias is not None:
        raise NotImplementedError("the streaming backend takes no bias, which is as large as the scores; use 'dense'")
    return backend


def _check(query: Tensor, key: Tensor, value: Tensor, gradient: str, backend: str) -> None:
    q, k, v = query.shape, key.shape, value.shape
    if min(len(q), len(k), len(v)) < 2 or not q[:-2] == k[:-2] == v[:-2]:
        raise ValueError(
            "query, key and value need the same leading axes, then (tokens, features): "
            f"got query {tuple(q)}, key {tuple(k)}, value {tuple(v)}"
        )
    if q[-1] != k[-1] or k[-2] != v[-2]:
        raise ValueError(
            "query and key need one width, key and value one number of tokens: "
            f"got query {tuple(q)}, key {tuple(k)}, value {tuple(v)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value need one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    for name, chosen, valid in (("gradient", gradient, GRADIENTS), ("backend", backend, BACKENDS)):
        if chosen not in valid:
            raise ValueError(f"{name} must be one of {', '.join(valid)}, got {chosen!r}")
