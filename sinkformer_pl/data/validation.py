"""Data that bring their own validation samples."""

import inspect

from pytorch_lightning.utilities import rank_zero_warn

from sinkformer_pl.data.classification import ClassificationData


def warn_if_unused(val_fraction: float, place: str) -> None:
    """Say that a `val_fraction` other than the default one has no effect.

    Args:
        val_fraction: what the data module was given.
        place: where its validation samples are.
    """
    if val_fraction != inspect.signature(ClassificationData).parameters["val_fraction"].default:
        rank_zero_warn(f"data.val_fraction {val_fraction} counts for nothing, validation is {place}; leave one out")
