"""The promises that a normalization makes of its weights."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Promises:
    """Promises of a normalization about its weights in evaluation mode, which `check_normalization` tests.

    Attributes:
        row_sums: sums over the keys: "one", "at most one", or None for no promise. A query without a key has a row of
            zeros in any case.
        unit_columns: columns sum to Q/K in the limit of many iterations.
        sparse: some weights of real pairs are exactly zero.
        equivariant: permuting queries or keys permutes the weights.
        pairs: an AttentionMask with any `pairs` is honoured.
        causal: causal `pairs` are honoured.
        linear: `attend` takes time and memory linear in Q + K.
        stochastic: training mode draws random numbers.
        exact_gradient: gradients are those of the weights; False where a part is held constant or approximated.
    """

    row_sums: Literal["one", "at most one"] | None = None
    unit_columns: bool = False
    sparse: bool = False
    equivariant: bool = False
    pairs: bool = False
    causal: bool = False
    linear: bool = False
    stochastic: bool = False
    exact_gradient: bool = True
