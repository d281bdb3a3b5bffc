"""Everything that a source of samples has, of any modality."""

from typing import Generic, NamedTuple, TypeVar

SamplesT = TypeVar("SamplesT")


class Source(NamedTuple, Generic[SamplesT]):
    """Samples in their parts: `Images`, `Texts` or `Clouds`.

    Attributes:
        train: to train on.
        test: to test on.
        val: to validate on; None to divide them from those to train on.
    """

    train: SamplesT
    test: SamplesT
    val: SamplesT | None = None
