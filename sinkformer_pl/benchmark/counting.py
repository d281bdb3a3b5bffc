"""Operations of Sinkhorn and softmax attention, forward and backward, and how long they take at the least."""

from typing import NamedTuple

ON_CHIP = 256
"""Keys, or queries, up to which a head is one program: all of them are on chip, the other side comes by."""

PRODUCT_PS, EXPONENTIAL_PS = 0.13, 0.28
"""Of an H100 at width 64, for each entry of queries x keys: the tensor cores, the special-function units.

At 990e12 operations a second in bfloat16, 2 x 64 of them an entry; and at 132 x 16 exponentials a clock of 1.7e9.
"""


class Operations(NamedTuple):
    """For each entry of queries x keys.

    Attributes:
        products: of width 64, of the kind of q k^T.
        exponentials: each of one entry.
    """

    products: int
    exponentials: int

    def seconds(self, entries: int) -> float:
        """Compute the least time of an H100, in seconds: both units at work one after the other."""
        return entries * (self.products * PRODUCT_PS + self.exponentials * EXPONENTIAL_PS) / 1e12


SOFTMAX = Operations(products=7, exponentials=2)


def sinkhorn(queries: int, keys: int, n_iters: int) -> Operations:
    """Count those of an odd number of half-steps, as the kernels for GPUs take them (docs/fast_attention.md).

    One program a head takes a row step and the column step behind it in one pass, with the keys on chip the first time
    at one exponential more. Streaming takes a pass for each half-step, and three more for the gradients.
    """
    pairs = (n_iters - 1) // 2
    if n_iters == 1:
        return SOFTMAX
    if min(queries, keys) <= ON_CHIP:
        # Forward: a pass a pair, and one with the values. Backward: the values, a pass for each further pair, the last.
        return Operations(
            products=(pairs + 2) + (pairs + 5), exponentials=(pairs + 1 + (keys <= ON_CHIP)) + (pairs + 1)
        )
    # Forward: a pass a half-step, the last with the values. Backward: the values, the vectors, keys, queries.
    return Operations(products=(n_iters + 1) + (n_iters + 6), exponentials=n_iters + (n_iters + 1))
