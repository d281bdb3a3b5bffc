"""Attention among particles, as the velocity of each."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sinkformer_pl.flows.potentials import potentials

Kernel = Literal["exponential", "softmax", "sinkhorn"]
Cost = Literal["dot", "l2"]


@dataclass(frozen=True)
class ParticleAttention:
    """Self-attention of the measure mu = sum_j m_j delta(x_j): x -> ∫ k(x, y) W_V y dmu(y).

    The scores are c(x, y) = <W_Q x, W_K y> / epsilon, or -|W_Q x - W_K y|² / (2 epsilon). The kernel k is exp(c), not
    normalized at all (K^0); exp(c) over its integral in y (softmax, K^1); or exp(c + f + g), whose integrals in x and
    in y both are 1 (Sinkhorn at convergence, K^inf).

    Attributes:
        query: W_Q, (E, D).
        key: W_K, (E, D).
        value: W_V, (D, D).
        kernel: "exponential", "softmax" or "sinkhorn".
        cost: "dot" or "l2".
        epsilon: temperature, in the unit of <W_Q x, W_K y>, positive.

    References:
        Sander et al. 2022 (sander2022sinkformers).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kernel: Kernel = "sinkhorn"
    cost: Cost = "dot"
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        for name, valid in (("kernel", Kernel), ("cost", Cost)):
            if getattr(self, name) not in get_args(valid):
                raise ValueError(f"{name} must be one of {', '.join(get_args(valid))}, got {getattr(self, name)!r}")
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")
        if self.query.ndim != 2 or self.query.shape != self.key.shape:
            shapes = f"{tuple(self.query.shape)} and {tuple(self.key.shape)}"
            raise ValueError(f"query and key must be matrices of one shape, got {shapes}")
        width = self.query.shape[1]
        if self.value.shape != (width, width):
            raise ValueError(f"value must be {width} x {width}, as wide as the query, got {tuple(self.value.shape)}")

    @classmethod
    def descent(
        cls, query: Tensor, key: Tensor, kernel: Kernel = "sinkhorn", epsilon: float = 1.0
    ) -> "ParticleAttention":
        """Make attention on dot products with W_V = -W_Q^T W_K / epsilon: K^0 and K^inf then descend a functional.

        Args:
            query: W_Q, (E, D).
            key: W_K, (E, D), such that W_Q^T W_K is symmetric.
            kernel: of the attention.
            epsilon: temperature.

        Raises:
            ValueError: W_Q^T W_K isn't symmetric.
        """
        product = query.mT @ key
        if not torch.allclose(product, product.mT):
            raise ValueError(
                f"query^T key must be symmetric for a descent, got {product.tolist()}; give a value for another flow"
            )
        return cls(query, key, -product / epsilon, kernel, "dot", epsilon)

    @classmethod
    def smoothing(
        cls, dimension: int, epsilon: float, kernel: Kernel = "sinkhorn", cost: Cost = "l2"
    ) -> "ParticleAttention":
        """Make attention with identities for all three matrices, in float64: the mean of y under k(x, y)."""
        one = torch.eye(dimension, dtype=torch.float64)
        return cls(one, one, one, kernel, cost, epsilon)

    def under(self, kernel: Kernel) -> "ParticleAttention":
        """Return the same attention under another kernel."""
        return replace(self, kernel=kernel)

    def scores(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute c(x_i, y_j).

        Args:
            x: (N, D), the dtype of the matrices.
            y: (M, D); None is x.

        Returns:
            (N, M).
        """
        queries, keys = x @ self.query.mT, (x if y is None else y) @ self.key.mT
        if self.cost == "dot":
            return queries @ keys.mT / self.epsilon
        return -(queries[:, None] - keys).square().sum(-1) / (2 * self.epsilon)

    def weights(self, x: Tensor, log_mass: Tensor | None = None) -> Tensor:
        """Compute k(x_i, x_j) m_j, the attention matrix.

        Args:
            x: (N, D).
            log_mass: (N,), logarithms of masses that sum to 1; None is 1/N each.

        Returns:
            (N, N).

        Raises:
            ValueError: Sinkhorn does not converge.
        """
        scores = self.scores(x)
        log_mass = x.new_full((len(x),), -math.log(len(x))) if log_mass is None else log_mass
        if self.kernel == "exponential":
            return (scores + log_mass).exp()
        if self.kernel == "softmax":
            return (scores + log_mass).softmax(-1)
        f, g = potentials(scores, log_mass)
        return (scores + f + g + log_mass).exp()

    def __call__(self, x: Tensor, log_mass: Tensor | None = None) -> Tensor:
        """Compute the velocity of each particle, ∫ k(x_i, y) W_V y dmu(y), (N, D); arguments as of `weights`."""
        return self.weights(x, log_mass) @ x @ self.value.mT
