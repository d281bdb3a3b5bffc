"""Sinkhorn's potentials at convergence, with derivatives by the implicit function theorem."""

import torch
from torch import Tensor

MAX_STEPS = 1000
"""Steps in the log domain, with `INNER_STEPS` on the plan between two of them, before scores count as too sharp."""

INNER_STEPS = 20

REFINEMENTS = 2
"""Differentiable Newton steps: k of them have the right derivatives up to order 2^k - 1."""


def potentials(scores: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Find f and g with sum_j k_ij m_j = 1 for all i, sum_i k_ij m_i = 1 for all j, k_ij = exp(scores_ij + f_i + g_j).

    Both are updated at once by the mean of old and new, f <- (f + S(g)) / 2 with S(g)_i = -logsumexp_j(scores_ij + g_j
    + log m_j), and g likewise, until they move by no more than rounding. For symmetric scores f = g throughout, and
    where exp(scores) is positive definite each step halves the error or better; else the rate is (1 + p) / 2, p the
    second singular value of the plan.

    Args:
        scores: (N, N), float32 or float64.
        log_mass: (N,), logarithms of the masses m, which sum to 1.

    Returns:
        f (N, 1) and g (1, N), up to a constant that one has and the other lacks; differentiable three times.

    Raises:
        ValueError: no convergence within `MAX_STEPS`.
    """
    with torch.no_grad():
        f, g = _converged(scores, log_mass)
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return f, g
    for _ in range(REFINEMENTS):
        f, g = _newton(scores, log_mass, f, g)
    return f, g


def _converged(scores: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    f, g = torch.zeros_like(scores[:, :1]), torch.zeros_like(scores[:1])
    tolerance = 64 * torch.finfo(scores.dtype).eps
    for _ in range(MAX_STEPS):
        f_step, g_step = (gap / 2 for gap in _gaps(scores, log_mass, f, g))
        f, g = f - f_step, g - g_step
        if torch.maximum(_relative(f_step, f), _relative(g_step, g)) <= tolerance:
            return f, g
        # The same steps as factors of a plan that has f and g in it: products of matrices, without exponentials.
        plan = scores + f + g
        by_row, by_column = (plan + log_mass).exp(), (plan + log_mass[:, None]).exp().mT
        if torch.minimum(by_row.sum(1), by_column.sum(1)).amin() < torch.finfo(scores.dtype).tiny ** 0.25:
            continue  # Too far off: the factors would overflow.
        u = v = torch.ones_like(f)
        for _ in range(INNER_STEPS):
            u, v = (u / (by_row @ v)).sqrt(), (v / (by_column @ u)).sqrt()
        f, g = f + u.log(), g + v.mT.log()
    steps = MAX_STEPS * (1 + INNER_STEPS)
    raise ValueError(
        f"Sinkhorn's potentials did not converge in {steps} steps: scores from {float(scores.min()):.3g} to "
        f"{float(scores.max()):.3g} are too sharp; take a larger epsilon or smaller particles"
    )


def _relative(step: Tensor, potential: Tensor) -> Tensor:
    return (step.abs() / (1 + potential.abs())).amax()


def _gaps(scores: Tensor, log_mass: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the logarithms of the row and of the column sums."""
    rows = f + (scores + g + log_mass).logsumexp(1, keepdim=True)
    columns = g + (scores + f + log_mass[:, None]).logsumexp(0, keepdim=True)
    return rows, columns


def _newton(scores: Tensor, log_mass: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    n = len(log_mass)
    row_gap, column_gap = _gaps(scores, log_mass, f, g)
    by_row = (scores + g + log_mass).softmax(1)
    by_column = (scores + f + log_mass[:, None]).softmax(0)
    one = torch.eye(n, dtype=scores.dtype, device=scores.device)
    # A constant may move from f to g: the system is singular along (1, -1), which is filled up.
    fill = one.new_ones(n, n) / n
    system = torch.cat((torch.cat((one + fill, by_row - fill), 1), torch.cat((by_column.mT - fill, one + fill), 1)))
    step = torch.linalg.solve(system, torch.cat((row_gap, column_gap.mT)))
    return f - step[:n], g - step[n:].mT
