"""The reference backend: scores, the loop in the log domain, autograd through it. An oracle for the others."""

from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.marginals import Marginals, only
from sinkformer_pl.ops.sinkhorn import Plan, half_steps
from sinkformer_pl.ops.sinkhorn_attention.problem import Gradient


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    marginals: Marginals,
    lam: float | Tensor,
    n_iters: int,
    gradient: Gradient,
) -> tuple[Tensor, Plan]:
    """Output (..., Q, Dv) and plan; time and memory O(n_iters Q K).

    Args:
        q: (..., Q, D), at least float32, the scale multiplied in.
        k: (..., K, D).
        v: (..., K, Dv).
        bias: broadcastable to (..., Q, K), -inf where a pair is forbidden, or None.
        marginals: of the plan.
        lam: damping of the column step, a number or broadcastable to (..., 1, 1).
        n_iters: half-steps.
        gradient: of what the gradient is.
    """
    scores = q @ k.mT
    if bias is not None:
        scores = scores + bias
    if gradient != "implicit":
        plan = half_steps(scores, marginals, lam, n_iters, detach_columns=gradient == "detached")
        return plan.weights @ v, plan
    with torch.no_grad():
        plan = half_steps(scores, marginals, lam, n_iters)
        columns = marginals.columns
        lse = scores + plan.f
        if marginals.rows is not None:
            lse = lse.masked_fill(~marginals.rows, float("-inf"))
        lse = lse.logsumexp(-2, keepdim=True)
        distance = torch.where(lse > -torch.inf, only(marginals.log_column - lse, columns), 0.0)
    weights = _FixedPoint.apply(
        scores, torch.as_tensor(lam), marginals.log_row, marginals.log_column, plan.weights, distance
    )
    return weights @ v, plan


class _FixedPoint(torch.autograd.Function):
    """A plan, as a function of its scores at the fixed point of the half-steps; the adjoint by a pseudo-inverse."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, lam: Tensor, log_row: Tensor, log_column: Tensor, plan: Tensor, distance: Tensor
    ) -> Tensor:
        ctx.save_for_backward(lam, log_row, log_column, plan, distance)
        return plan.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        lam, log_row, log_column, plan, distance = ctx.saved_tensors
        direct = plan * grad
        f, g = direct.sum(-1, keepdim=True), direct.sum(-2, keepdim=True)
        normalized = plan / plan.sum(-2, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)
        rows = plan / log_row.exp()
        system = torch.eye(plan.shape[-1], dtype=plan.dtype, device=plan.device) - lam * rows.mT @ normalized
        g = (torch.linalg.pinv(system) @ (g.mT - rows.mT @ f)).mT
        f = f - lam * normalized @ g.mT
        dlam = (g * distance).sum((-2, -1), keepdim=True)
        dscores = direct - f * rows - lam * g * normalized
        drow, dcolumn = f.sum_to_size(log_row.shape), (lam * g).sum_to_size(log_column.shape)
        return dscores, dlam.sum_to_size(lam.shape), drow, dcolumn, None, None
