"""Metrics that torchmetrics lacks."""

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ExactMean(Metric):
    """The mean of values of samples, the same to the last bit for any batches and any number of processes.

    A sum of floats depends on the order of its terms; here they are kept, and added in the order of their size.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        """Take what every Metric takes."""
        super().__init__(**kwargs)
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add the values (B,) of some samples, any float type; B may be 0."""
        self.values.append(values.float())

    def compute(self) -> Tensor:
        """The mean, a float32 scalar; NaN without values."""
        return dim_zero_cat(self.values).sort().values.mean()
