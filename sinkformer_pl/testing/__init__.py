"""Test the contract of a normalization in one call, for this package's own classes and for yours."""

import warnings
from collections.abc import Sequence

import torch

from sinkformer_pl.normalizations.contract import NormalizationFactory
from sinkformer_pl.testing import engineering, interface, masking, numbers, promises
from sinkformer_pl.testing.rehearsal import rehearse
from sinkformer_pl.testing.subject import Subject

__all__ = ["check_normalization", "rehearse"]

_CHECKS = (  # in this order, so that what is reported is the cause: interface.instances sets what all others use
    *(interface.instances, interface.shapes, promises.refusals),
    *(masking.masks, interface.attend, masking.padding, masking.batch, masking.all_real),
    *(interface.scale, interface.bias, masking.forbidden, masking.no_tokens),
    *(promises.row_sums, promises.unit_columns, promises.sparse),
    *(promises.equivariant, promises.causal, promises.linear),
    *(engineering.repeatable, numbers.precision, numbers.autocast, numbers.extremes),
    *(engineering.state, engineering.parameters, numbers.gradients),
)


def check_normalization(
    factory: NormalizationFactory,
    *,
    converged: NormalizationFactory | None = None,
    dtypes: Sequence[torch.dtype] = tuple(numbers.ROUNDED),
    num_heads: int = 2,
    head_dim: int = 8,
    seed: int = 0,
    compiled: bool = True,
) -> None:
    """Hold a normalization to the contract and to the promises that its class makes.

    `check_normalization(MyNormalization)` is a complete test: small inputs, on the CPU, in a few seconds. It stops at
    the first rule that is broken, and warns of claims about a limit that it couldn't check.

    Args:
        factory: makes a new normalization at each call: a class, or `functools.partial(MyNormalization, k=3)`.
        converged: the same with iterations enough for columns to sum to Q/K; only used if `unit_columns` is declared.
            Without it a claim about columns in the limit can't be checked, which a warning says.
        dtypes: those of float64, float32, bfloat16, float16 that it must take; the first two are used in any case.
        num_heads: heads that it is built for.
        head_dim: width of queries and keys that it is built for; values are two narrower.
        seed: of the inputs, and of what the normalization draws when it is made.
        compiled: also ask for one graph from `torch.compile`, the slowest of the checks.

    Raises:
        AssertionError: the message names the class, the rule, what came instead and the input.
    """
    subject = Subject(factory, converged, tuple(dtypes), num_heads, head_dim, seed)
    for check in (*_CHECKS, engineering.compile) if compiled else _CHECKS:
        try:
            check(subject)
        except Exception as error:
            expected = isinstance(error, AssertionError)
            found = str(error) if expected else f"{type(error).__name__}: {error}"
            seen = f"\n  input: {subject.seen}" if subject.seen else ""
            where = f"{subject.name} fails the check '{check.__name__}'\n  rule: {check.__doc__}"
            raise AssertionError(f"{where}\n  found: {found}{seen}") from (None if expected else error)
    for claim in subject.unchecked:
        warnings.warn(
            f"check_normalization({subject.name}) passes, but not all of it was checked: {claim}", stacklevel=2
        )
