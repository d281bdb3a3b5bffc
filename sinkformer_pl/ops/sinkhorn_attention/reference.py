"""The reference backend: scores, the loop in the log domain, autograd through it. An oracle for the others."""

from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.marginals import Marginals, only
from sinkformer_pl.ops.sinkhorn import half_steps
from sinkformer_pl.ops.sinkhorn_attention.problem import Problem, Solution


def reference_attention(p: Problem) -> Solution:
    """Solve a problem; time and memory O(n_iters Q K)."""
    scores = p.scale * p.q @ p.k.mT
    if p.bias is not None:
        scores = scores + p.bias
    lam = 1.0 if p.lam is None else p.lam
    columns = None if p.columns is None else p.columns.mT
    n, queries, keys = scores.shape
    log_column = (scores.new_zeros(n, 1, 1) + p.log_ratio).expand(n, 1, keys)
    marginals = Marginals(scores.new_zeros(n, queries, 1), log_column, p.rows, columns)
    if p.gradient == "implicit":
        with torch.no_grad():
            weights, f, g = half_steps(scores, marginals, lam, p.n_iters)
            lse = (scores + f).masked_fill(~p.rows, float("-inf")) if p.rows is not None else scores + f
            distance = only(p.log_ratio - lse.logsumexp(-2, keepdim=True), columns)
        weights = _FixedPoint.apply(scores, torch.as_tensor(lam), weights, distance)
    else:
        weights, f, g = half_steps(scores, marginals, lam, p.n_iters, detach_columns=p.gradient == "detached")
    output = weights @ p.v
    if not p.with_info:
        return Solution(output, None, None, None)
    plan, f, g = weights.detach(), f.detach(), g.detach()
    row_error = only((plan.sum(-1, keepdim=True) - 1).abs(), p.rows)
    column_error = only((plan.sum(-2, keepdim=True) / marginals.log_column.exp() - 1).abs(), columns)
    return Solution(output, f, g.mT, torch.maximum(row_error.amax((-2, -1)), column_error.amax((-2, -1))))


class _FixedPoint(torch.autograd.Function):
    """A plan, as a function of its scores at the fixed point of the half-steps; the adjoint by a pseudo-inverse."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, lam: Tensor, plan: Tensor, distance: Tensor) -> Tensor:
        ctx.save_for_backward(lam, plan, distance)
        return plan.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        lam, plan, distance = ctx.saved_tensors
        direct = plan * grad
        f, g = direct.sum(-1, keepdim=True), direct.sum(-2, keepdim=True)
        normalized = plan / plan.sum(-2, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)
        system = torch.eye(plan.shape[-1], dtype=plan.dtype, device=plan.device) - lam * plan.mT @ normalized
        g = (torch.linalg.pinv(system) @ (g.mT - plan.mT @ f)).mT
        f = f - lam * normalized @ g.mT
        dlam = (g * distance).sum((-2, -1), keepdim=True)
        return direct - f * plan - lam * g * normalized, dlam.sum_to_size(lam.shape), None, None
