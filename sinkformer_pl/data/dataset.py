"""One split of labelled samples."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinkformer_pl.batch import UNCOUNTED, Sample
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.sampling import Draw
from sinkformer_pl.errors import UserError

Split = Literal["train", "val", "test"]


class LabelledDataset(Dataset[Sample], ABC):
    """One split: a subclass writes `inputs`.

    Attributes:
        targets: (n,) int64 class indices; of multi-label data (n, num_classes) bool, True where a class holds.
        names: n names, for prediction files and messages.
        preprocessing: of evaluation, where it isn't the subclass's own affair.
    """

    preprocessing: Preprocessing | None = None

    def __init__(self, targets: Tensor, names: Sequence[str]) -> None:
        """Keep targets and names, both in the order of the samples."""
        self.targets = targets
        self.names = names

    @abstractmethod
    def inputs(self, draw: Draw) -> Tensor:
        """Return sample `draw.index`, everything random about it taken from `draw.seed` alone."""

    def use(self, preprocessing: Preprocessing) -> None:
        """Take another preprocessing, that of a checkpoint."""
        self.preprocessing = preprocessing

    @property
    def lengths(self) -> Sequence[int] | None:
        """The n sizes of the inputs, where training batches are to hold samples of similar size; None by default."""
        return None

    @property
    def extremes(self) -> Sequence[int]:
        """Places of the samples that a network is likeliest to refuse; it is tried with them before it is trained."""
        return (0,)

    def content(self) -> Iterable[bytes]:
        """Yield what tells the samples from others of their names and classes: sizes of files, bytes in memory.

        A training resumes only where that is the same; nothing by default.
        """
        return ()

    @cached_property
    def fingerprint(self) -> bytes:
        """A hash of names and content, in the order of the samples."""
        digest = hashlib.sha256("\n".join(map(str, self.names)).encode())
        for part in self.content():
            digest.update(part)
        return digest.digest()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.targets)

    def __getitem__(self, draw: Draw | int) -> Sample:
        """Return a sample; a plain index, which Lightning's `overfit_batches` asks for, is its own seed."""
        if not isinstance(draw, Draw):
            draw = Draw(index=draw, seed=draw)
        inputs = self.inputs(draw)
        if not isinstance(inputs, Tensor):
            raise UserError(f"{type(self).__name__}.inputs: gave a {type(inputs).__name__}; return a tensor")
        target = self.targets[draw.index]
        if target.ndim:
            return Sample(
                inputs, target.float() if draw.counted else torch.full(target.shape, UNCOUNTED).float(), draw.index
            )
        return Sample(inputs, int(target) if draw.counted else UNCOUNTED, draw.index)
