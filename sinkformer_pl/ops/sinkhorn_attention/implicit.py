"""The cotangent of the key potential at the fixed point of the half-steps."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sinkformer_pl.ops.marginals import only

STEPS = 40
"""Steps of the conjugate gradients."""


def key_cotangent(
    gram: Callable[[Tensor], Tensor],
    right_side: Tensor,
    sums: Tensor,
    lam: float | Tensor,
    columns: Tensor | None,
) -> Tensor:
    """Solve (1 - lam P^T P / s) g = g0 - P^T f0 by conjugate gradients, with s the column sums of the plan P.

    These are the cotangents of the fixed point, g = g0 - P^T f and f = f0 - lam P (g / s), without f. In the unknown
    g / sqrt(s) the system is symmetric and positive (semi)definite.

    Args:
        gram: x -> P^T P x.
        right_side: g0 - P^T f0, (N, 1, K).
        sums: s, likewise.
        lam: damping of the column step.
        columns: the keys with mass; None is all.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True)

    root = only(sums.rsqrt(), columns)
    # An eigenvector, of eigenvalue 1 - lam, to which the right side is orthogonal: moved away from 0, where lam = 1
    # would make the system singular.
    unit = functional.normalize(sums.sqrt(), dim=-1)
    residual = root * right_side
    solution, direction = torch.zeros_like(residual), residual
    square = dot(residual, residual)
    enough = square * torch.finfo(square.dtype).eps ** 2
    for _ in range(STEPS):
        image = direction - lam * root * gram(root * direction) + unit * dot(unit, direction)
        curvature = dot(direction, image)
        # Without a branch: a solved system takes steps of length 0 from here on.
        going = (square > enough) & (curvature > 0)
        length = torch.where(going, square / curvature, 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        previous, square = square, dot(residual, residual)
        direction = residual + torch.where(going, square / previous, 0.0) * direction
    return only(solution / root, columns)
