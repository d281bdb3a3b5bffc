"""Sinkhorn: doubly stochastic attention."""

from dataclasses import replace
from typing import get_args

from sinkformer_pl.normalizations.half_steps import HalfSteps
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.sinkhorn import require_odd_half_steps
from sinkformer_pl.ops.sinkhorn_attention.problem import Gradient


@register
class Sinkhorn(HalfSteps):
    """The attention of Sinkformers: exp(scores) with rows and columns normalized in turn, rows first and last.

    Args:
        n_iters: number of half-steps, odd, so that the last one is a row step: rows sum to 1 exactly, columns to Q/K in
            the limit (`sinkformer_pl.ops.marginal_error` measures how far off they are). 1 is Softmax.
        gradient: "unrolled", exact for these half-steps; "implicit", of the limit, at a cost that doesn't depend on
            `n_iters`; "detached", with the potential of the keys held constant, as in the text experiments of Sander et
            al. 2022. In the path of training, `attend`; `weights` differentiates the half-steps.

    Raises:
        ValueError: `n_iters` is even or below 1, another gradient, or an implicit one of a single half-step.
        NotImplementedError: in use, a mask with `pairs`.

    References:
        Sander et al. 2022 (sander2022sinkformers).
    """

    promises = Promises(row_sums="one", unit_columns=True, equivariant=True)

    def __init__(self, n_iters: int = 3, gradient: Gradient = "unrolled") -> None:
        super().__init__()
        require_odd_half_steps(n_iters, of=type(self).__name__)
        if gradient not in get_args(Gradient):
            raise ValueError(f"Sinkhorn: gradient must be one of {', '.join(get_args(Gradient))}, got {gradient!r}")
        if gradient == "implicit" and n_iters < 3:
            raise ValueError(
                "Sinkhorn: gradient='implicit' is of the limit, n_iters=1 has no column step: use 3 or more"
            )
        self.n_iters = n_iters
        self.gradient: Gradient = gradient
        if n_iters == 1:
            self.promises, self.takes_marginal = replace(self.promises, unit_columns=False), False
        if gradient != "unrolled" and n_iters > 1:
            self.promises = replace(self.promises, exact_gradient=False)
